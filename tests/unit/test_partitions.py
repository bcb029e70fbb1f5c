"""Shares of the training state in the shapes in which DeepSpeed's optimizers keep it, without processes.

What the real optimizers do is in tests/dist: test_parity.py and test_checkpoint.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from llama_dist.pipeline.partitions import (
    MOMENTS,
    flat_masters,
    read_shares,
    refresh_parameters,
    set_optimizer_step,
    start_optimizer_state,
)

BUFFERS = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")


def optimizer_with(name: str, sizes: tuple[int, ...] = (10, 4)) -> Any:
    """Stands in for a ZeRO optimizer that keeps its float32 state under `name`."""
    flats = [torch.arange(float(size)) + 100 * i for i, size in enumerate(sizes)]
    return SimpleNamespace(**{name: flats}, optimizer=SimpleNamespace(state={}))


@pytest.mark.parametrize("name", BUFFERS)
def test_the_state_begins_as_adamw_would_begin_it(name: str) -> None:
    optimizer = optimizer_with(name)
    start_optimizer_state(optimizer)
    parameter = nn.Parameter(torch.ones(3))
    adamw = torch.optim.AdamW([parameter], lr=0.0, fused=True)
    parameter.grad = torch.zeros(3)
    adamw.step()
    for flat in flat_masters(optimizer):
        ours, real = optimizer.optimizer.state[flat], adamw.state[parameter]
        assert ours.keys() == real.keys()
        assert ours["step"].item() == 0 and ours["step"].dtype == real["step"].dtype
        for moment in MOMENTS:
            assert ours[moment].shape == flat.shape and ours[moment].eq(0).all()
    set_optimizer_step(optimizer, 17)
    assert [optimizer.optimizer.state[flat]["step"].item() for flat in flat_masters(optimizer)] == [17, 17]


def test_an_unknown_optimizer_is_named() -> None:
    class SomethingElse:
        pass

    with pytest.raises(RuntimeError, match="SomethingElse of this DeepSpeed has no flat float32 buffer") as error:
        flat_masters(SomethingElse())
    assert "0.19.8" in str(error.value)


def fragment(flat: torch.Tensor, *, start: int, numel: int, at: int, group: int) -> Any:
    """The mapping that ZeRO-1 and 2 put on a parameter of which a rank holds [start, start + numel)."""
    return SimpleNamespace(
        lp_fragment_address=SimpleNamespace(start=start, numel=numel),
        hp_fragment_address=SimpleNamespace(start=at, numel=numel),
        hp_fragment=flat.narrow(0, at, numel),
        param_group_index=group,
    )


def test_zero_1_and_2_shares_are_views_and_leave_out_what_others_hold() -> None:
    optimizer = optimizer_with("single_partition_of_fp32_groups")
    start_optimizer_state(optimizer)
    first, second = optimizer.single_partition_of_fp32_groups
    named = {name: nn.Parameter(torch.zeros(size)) for name, size in (("a", 6), ("elsewhere", 3), ("b", 8), ("n", 4))}
    named["a"]._hp_mapping = fragment(first, start=2, numel=4, at=0, group=0)
    named["elsewhere"]._hp_mapping = None
    named["b"]._hp_mapping = fragment(first, start=0, numel=6, at=4, group=0)
    named["n"]._hp_mapping = fragment(second, start=0, numel=4, at=0, group=1)
    shapes = {"a": (3, 2), "elsewhere": (3,), "b": (2, 4), "n": (4,)}
    shares = read_shares(optimizer, named, shapes, zero=2)
    assert [(s.name, s.shape, s.start, s.stop) for s in shares] == [
        ("a", (3, 2), 2, 6),
        ("b", (2, 4), 0, 6),
        ("n", (4,), 0, 4),
    ]
    assert torch.equal(shares[1].master, torch.arange(4.0, 10.0))
    for share in shares:
        share.master.fill_(-1)
        share.exp_avg.fill_(-2)
        share.exp_avg_sq.fill_(-3)
    assert all(flat.eq(-1).all() for flat in (first, second))
    for flat in (first, second):
        assert optimizer.optimizer.state[flat]["exp_avg"].eq(-2).all()
        assert optimizer.optimizer.state[flat]["exp_avg_sq"].eq(-3).all()


def test_refreshing_below_zero_3_is_deepspeeds_own_copy() -> None:
    calls: list[str] = []
    refresh_parameters(SimpleNamespace(update_lp_params=lambda: calls.append("update")), [], zero=1)
    assert calls == ["update"]
