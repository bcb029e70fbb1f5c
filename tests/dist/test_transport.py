"""Messages between stages: posted ahead or where they stand in the program, they arrive; and nothing waits for nothing."""

from __future__ import annotations

import weakref

import pytest
import torch
from parity import compare, plain, train_on_rank
from small_runs import Case, coordinator_on_rank, on_ranks, restore_on_rank
from torch import Tensor

from llama_dist.eval.scoring import Replica, Request, log_likelihoods
from llama_dist.pipeline import transport
from llama_dist.pipeline.engine import Root, StageEngine


def train_as_on_gpus_on_rank(case: Case) -> object:
    """Train with receives posted where they stand, and wait after every backward for all that are posted."""
    posted: list[transport.Message] = []
    message, backward, weights = transport.Message, StageEngine.backward, StageEngine.backward_weights

    def noted(work: object, data: Tensor) -> transport.Message:
        made = message(Once(work), data)
        posted.append(made)
        return made

    def then_wait(method: object) -> object:
        def call(self: StageEngine, *args: object, **named: object) -> None:
            method(self, *args, **named)
            while posted:
                posted.pop().wait()

        return call

    transport.AHEAD["cpu"], transport.Message = transport.AHEAD["cuda"], noted
    StageEngine.backward, StageEngine.backward_weights = then_wait(backward), then_wait(weights)
    try:
        return train_on_rank(case)
    finally:
        transport.AHEAD["cpu"], transport.Message = 2, message
        StageEngine.backward, StageEngine.backward_weights = backward, weights


class Once:
    """Work that may be waited for again, as on GPUs."""

    def __init__(self, work: object) -> None:
        self._work, self._done = work, False

    def wait(self) -> None:
        if not self._done:
            self._work.wait()
        self._done = True

    def is_completed(self) -> bool:
        return self._done


@pytest.mark.parametrize(
    "case",
    [
        Case(pp=2, zero=2),
        Case(pp=2, zero=1, schedule="interleaved", virtual_stages=2),
        Case(pp=4, zero=3, schedule="zb-h1", micro_batch=2),
        Case(pp=4, zero=2, schedule="gpipe", micro_batch=4),
    ],
    ids=str,
)
def test_a_device_that_waits_for_all_messages_does_not_wait_forever(case: Case) -> None:
    found = compare(case, on_ranks(case, train_as_on_gpus_on_rank), plain(case))
    assert not found.problems


def score_on_rank(case: Case, batch: int) -> list[float]:
    coordinator = coordinator_on_rank(case)
    restore_on_rank(coordinator)
    coord = coordinator.runtime.coord
    requests = [Request(tuple(range(1, 4 + i % 3))) for i in range(9)]
    replica = Replica(
        group=coordinator.runtime.groups.control,
        dp=case.dp,
        dp_rank=coord.dp,
        reports=coord.tp == coord.cp == 0 and coord.pp == case.pp - 1,
    )
    return log_likelihoods(coordinator.runner, requests, batch=batch, replica=replica)


@pytest.mark.parametrize("batch", [2, 8])
def test_replicas_with_batches_of_different_sizes_run_equally_many_forwards(batch: int) -> None:
    """Nine requests in batches of eight leave one replica with a single row, fewer than there are stages."""
    answers = on_ranks(Case(dp=2, pp=2, zero=3), score_on_rank, batch)
    alone = on_ranks(Case(zero=1), score_on_rank, 9)[0]
    assert all(answer == answers[0] for answer in answers)
    assert answers[0] == pytest.approx(alone, rel=1e-5)


def test_the_output_of_a_stage_is_not_kept_for_its_backward() -> None:
    x = torch.ones(3, requires_grad=True)
    y = x * 2
    kept, root = weakref.ref(y), Root(y)
    del y
    assert kept() is None
    root.scalar(torch.tensor([1.0, 2.0, 3.0])).backward()
    assert x.grad.tolist() == [2.0, 4.0, 6.0]


def sends_under_way_on_rank(case: Case) -> int:
    """Train a step; the most messages that were kept for sending at a time."""
    most, send = 0, transport.Transport.send

    def counted(self: transport.Transport, *args: object) -> None:
        nonlocal most
        send(self, *args)
        most = max(most, len(self._under_way))

    transport.Transport.send = counted
    try:
        train_on_rank(case, 1)
    finally:
        transport.Transport.send = send
    return most


def test_few_sent_messages_are_kept_whatever_the_number_of_micro_batches() -> None:
    first, _ = on_ranks(Case(pp=2, zero=1, schedule="gpipe", global_batch=16), sends_under_way_on_rank)
    assert 0 < first <= transport.SENT_AHEAD["cpu"]
