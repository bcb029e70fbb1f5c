"""The change to DeepSpeed's trace check: how it fails where DeepSpeed has changed. Its effect: tests/dist."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero import partitioned_param_coordinator
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from llama_dist.pipeline.zero_patch import CHECK, compare_traces_within_

CPU = torch.device("cpu")


def optimizer_of(coordinator: type) -> Any:
    return SimpleNamespace(parameter_offload=SimpleNamespace(param_coordinator=coordinator()))


def coordinator_from(source: str, **names: Any) -> type:
    """A coordinator class as another DeepSpeed might have it."""
    namespace = {"__name__": "deepspeed.other", "wraps": wraps, **names}
    exec(source, namespace)
    return namespace["Coordinator"]


def takes_ints(ints: list[int]) -> None:
    raise AssertionError("the check over all ranks was called")


AS_IT_IS = f"""
def disable(f):
    return wraps(f)(lambda *args: f(*args))
class Coordinator:
    @disable
    def reset_step(self):
        {CHECK}([1, 2])
    def other(self): pass
"""


@pytest.mark.parametrize(
    ("source", "names", "told"),
    [
        (AS_IT_IS.replace(CHECK, "assert_traces_agree"), {"assert_traces_agree": takes_ints}, "in no method"),
        (AS_IT_IS.replace("reset_step", "start_step"), {CHECK: takes_ints}, r"in \['start_step'\]"),
        (AS_IT_IS.replace("pass", f"{CHECK}([])"), {CHECK: takes_ints}, r"\['reset_step', 'other'\]"),
        (AS_IT_IS, {}, f"no name {CHECK}"),
        (AS_IT_IS.replace("reset_step(self)", "reset_step(self, mode)"), {CHECK: takes_ints}, r"\(self, mode\), not"),
        ("class Coordinator: pass", {}, "in no method"),
    ],
    ids=["renamed", "moved", "used twice", "gone", "method takes more", "empty"],
)
def test_a_changed_deepspeed_is_told(source: str, names: dict[str, Callable[..., None]], told: str) -> None:
    with pytest.raises(RuntimeError, match=told) as error:
        compare_traces_within_(optimizer_of(coordinator_from(source, **names)), None, device=CPU)
    for part in ("0.19.8", "parallel.zero=1", "zero_patch.py"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("call", "told"),
    [("([1, 2], 3)", "with 2 arguments"), ("(ints=[1])", r"0 arguments and \['ints'\]"), ("()", "with 0 arguments")],
)
def test_a_changed_call_is_told(call: str, told: str) -> None:
    optimizer = optimizer_of(coordinator_from(AS_IT_IS.replace("([1, 2])", call), **{CHECK: takes_ints}))
    compare_traces_within_(optimizer, None, device=CPU)
    with pytest.raises(RuntimeError, match=told) as error:
        optimizer.parameter_offload.param_coordinator.reset_step()
    assert "0.19.8" in str(error.value)


def test_an_optimizer_without_a_coordinator_is_told() -> None:
    class Other:
        pass

    with pytest.raises(RuntimeError, match="Other has no parameter_offload.param_coordinator"):
        compare_traces_within_(Other(), None, device=CPU)


def test_the_stand_in_is_as_deepspeed_is() -> None:
    """The source above, unchanged, is taken: so the tests above fail for what they change and nothing else."""
    coordinator = coordinator_from(AS_IT_IS, **{CHECK: takes_ints})
    with pytest.raises(AssertionError, match="over all ranks"):
        coordinator().reset_step()
    optimizer = optimizer_of(coordinator)
    compare_traces_within_(optimizer, None, device=CPU)
    with pytest.raises(ValueError, match="[Dd]efault process group"):  # ours was called, and asks for the group's size
        optimizer.parameter_offload.param_coordinator.reset_step()


def test_nothing_of_deepspeed_is_changed() -> None:
    before = dict(vars(partitioned_param_coordinator)), dict(vars(PartitionedParameterCoordinator))
    assert isinstance(before[0][CHECK], FunctionType)
    coordinator = PartitionedParameterCoordinator.__new__(PartitionedParameterCoordinator)
    optimizer = SimpleNamespace(parameter_offload=SimpleNamespace(param_coordinator=coordinator))
    compare_traces_within_(optimizer, None, device=CPU)
    assert "reset_step" in vars(coordinator)
    assert before == (dict(vars(partitioned_param_coordinator)), dict(vars(PartitionedParameterCoordinator)))
