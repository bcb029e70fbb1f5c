"""Evaluation on a distributed model: the plain model's log-probabilities, and scores that no layout changes."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from small_runs import Case, coordinator_on_rank, position_at, restore_on_rank, state_on_rank, steps_on_rank, tokens_at
from torch import Tensor
from workers import pool

from llama_dist.eval.scoring import PlainScorer, Replica, Request, log_likelihoods
from llama_dist.model.init import init_
from llama_dist.model.llama import Llama

NUM_REQUESTS, BATCH = 13, 3  # 5 batches, the last of one: neither divides by 2 or 4 ranks


def plain_model(case: Case) -> Llama:
    model = Llama(case.run.model)
    init_(model, case.run.model, case.run.train.seed)
    return model


def forward_on_rank(case: Case) -> Tensor:
    coordinator = coordinator_on_rank(case)
    restore_on_rank(coordinator)
    log_probs = coordinator.runner.forward_only(tokens_at(0)[:3, :11])
    assert not log_probs.requires_grad
    return log_probs


@pytest.mark.parametrize("zero", [1, 3])
@pytest.mark.parametrize("dp", [1, 2])
def test_forward_only_is_the_plain_models_log_probability(dp: int, zero: int) -> None:
    case = Case(zero=zero, recompute="full")
    tokens = tokens_at(0)[:3, :11]
    with torch.no_grad():
        everything = plain_model(case)(tokens[:, :-1]).log_softmax(dim=-1)
    expected = everything.gather(2, tokens[:, 1:, None]).squeeze(2)
    for log_probs in pool(dp).run(forward_on_rank, case):
        assert log_probs.dtype == torch.float32
        torch.testing.assert_close(log_probs, expected, rtol=1e-5, atol=1e-5)


def requests() -> list[Request]:
    """Of unequal lengths, in no order of length, some scored from within."""
    lengths = [3 + (5 * i) % 13 for i in range(NUM_REQUESTS)]
    return [
        Request(tuple(tokens_at(20 + i)[i % 8, :n].tolist()), scored_from=1 + i % (n - 1))
        for i, n in enumerate(lengths)
    ]


def scores_on_rank(case: Case) -> list[float]:
    coordinator = coordinator_on_rank(case)
    restore_on_rank(coordinator)
    return log_likelihoods(coordinator.runner, requests(), batch=BATCH, replica=coordinator.replica)


@lru_cache
def scores(dp: int, zero: int) -> list[float]:
    answers = pool(dp).run(scores_on_rank, Case(zero=zero))
    assert all(answer == answers[0] for answer in answers), "every rank knows all scores"
    return answers[0]


@pytest.mark.parametrize("zero", [1, 3])
@pytest.mark.parametrize("dp", [1, 2, 4])
def test_scores_are_the_same_bits_on_every_layout(dp: int, zero: int) -> None:
    assert len(scores(dp, zero)) == NUM_REQUESTS
    assert scores(dp, zero) == scores(1, 1)


def test_scores_are_the_plain_models() -> None:
    """Each request alone, without padding or batching, summed by hand."""
    model = plain_model(Case())
    for request, score in zip(requests(), scores(2, 3), strict=True):
        tokens = torch.tensor([request.tokens])
        with torch.no_grad():
            log_probs = model(tokens)[0].log_softmax(dim=-1)
        by_hand = sum(float(log_probs[i - 1, request.tokens[i]]) for i in range(request.scored_from, len(request.tokens)))
        assert score == pytest.approx(by_hand, rel=1e-5)
    plain = log_likelihoods(PlainScorer(model, device=torch.device("cpu")), requests(), batch=BATCH, replica=Replica())
    assert plain == pytest.approx(scores(2, 3), rel=1e-6)


def train_on_rank(case: Case, evaluated: bool) -> tuple[object, object]:
    coordinator = coordinator_on_rank(case)
    curve, position = [], restore_on_rank(coordinator)
    for step in range(3):
        curve += steps_on_rank(coordinator, case, position_at(step), 1)
        if evaluated:
            coordinator.runner.forward_only(tokens_at(50 + step)[:2, :9])
    state = [(name, start, arrays["master"].tobytes()) for name, start, _, arrays in state_on_rank(coordinator)]
    return curve, (position, state)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_evaluation_between_steps_changes_nothing(zero: int) -> None:
    case = Case(zero=zero, micro_batch=2, recompute="full")
    assert pool(2).run(train_on_rank, case, True) == pool(2).run(train_on_rank, case, False)
