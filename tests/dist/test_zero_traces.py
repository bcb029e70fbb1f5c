"""ZeRO-3's check of its module traces, confined to the ranks of a stage, with the real DeepSpeed over processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import own_group, small_engine
from torch import Tensor, nn
from workers import WorkerFailure, pool

from llama_dist.pipeline.zero_patch import assert_same_within, compare_traces_within_

CPU = torch.device("cpu")


class Tower(nn.Module):
    """`depth` linear layers; a call goes through those that it is told to."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))

    def forward(self, x: Tensor, order: list[int]) -> Tensor:
        for index in order:
            x = self.layers[index](x)
        return x


def tower_engine(depth: int, dp: dist.ProcessGroup, replica: dist.ProcessGroup) -> Any:
    """A ZeRO-3 engine over `dp` of a Tower with `depth` layers."""
    torch.manual_seed(depth)
    engine = small_engine(Tower(depth), zero=3, dp=dp, replica=replica)
    compare_traces_within_(engine.optimizer, dp, device=CPU)
    return engine


def train_two_stages(differs: bool) -> list[float]:
    """Ranks 0, 1 hold two layers and run three micro-batches; ranks 2, 3 hold three and run one: no two traces match.

    `differs`: rank 1 goes through its layers in another order than rank 0.
    """
    rank = dist.get_rank()
    dp = own_group((0, 1), (2, 3))
    engine = tower_engine(2 if rank < 2 else 3, dp, own_group((0, 2), (1, 3)))
    order = [0, 1] if rank < 2 else [2, 0, 1]
    if differs and rank == 1:
        order = [1, 0]
    losses = []
    for _ in range(3 if rank < 2 else 1):
        loss = engine(torch.ones(2, 4), order).sum()
        engine.backward(loss)
        losses.append(loss.item())
    dist.barrier()
    return losses


def test_stages_that_differ_do_not_wait_for_each_other() -> None:
    losses = pool(4).run(train_two_stages, False, timeout=60)
    assert losses[0] == losses[1] and losses[2] == losses[3]
    assert len(losses[0]) == 3 and len(losses[2]) == 1


def test_ranks_of_one_stage_that_part_are_told() -> None:
    with pytest.raises(WorkerFailure, match="same stage went through its modules in different orders") as error:
        pool(4).run(train_two_stages, True, timeout=60)
    assert "rank 0: " in str(error.value) and "rank 1: " in str(error.value)


def engines_one_after_the_other() -> tuple[list[int], list[float]]:
    """Ranks of one engine that held different stages before: DeepSpeed numbers their modules differently."""
    rank = dist.get_rank()
    first = tower_engine(1 + 2 * rank, own_group((0,), (1,)), own_group((0, 1)))
    first.backward(first(torch.ones(2, 4), [0]).sum())
    both = tower_engine(2, own_group((0, 1)), own_group((0,), (1,)))
    losses = []
    for _ in range(3):
        loss = both(torch.ones(2, 4), [0, 1]).sum()
        both.backward(loss)
        losses.append(loss.item())
    first(torch.ones(2, 4), [0])  # an engine that is not the newest still has its own group
    return [module.ds_id for module in both.module.modules()], losses


def test_engines_of_one_process_keep_their_own_groups() -> None:
    (first_ids, first), (second_ids, second) = pool(2).run(engines_one_after_the_other, timeout=60)
    assert first_ids != second_ids, "the ranks number their modules alike, so this shows nothing"
    assert first == second


def compare(ints: list[list[int]]) -> str:
    try:
        assert_same_within(ints[dist.get_rank()], group=own_group((0, 1)), device=CPU)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ([], [], True),
        ([4, 5, 5, 6], [14, 15, 15, 16], True),
        ([4, 5, 6], [4, 6, 5], False),
        ([4, 5, 6], [4, 5], False),
        ([], [0], False),
    ],
)
def test_integers_are_compared_up_to_a_constant(first: list[int], second: list[int], same: bool) -> None:
    answers = pool(2).run(compare, [first, second])
    assert [answer == "" for answer in answers] == [same, same]
    assert answers[0] == answers[1]
