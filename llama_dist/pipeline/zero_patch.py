"""The one piece of DeepSpeed's code that this project replaces: ZeRO-3 compares its module traces inside a stage only.

Before a forward pass ZeRO-3 makes sure that all ranks went through the same modules in the same order, by a broadcast
over all ranks of the run. Stages of a pipeline are different modules at different times, so that broadcast waits
forever. Here the same comparison is made over the ranks that hold the same stage: those are the ranks that gather each
other's parameters, so nothing that the check is there for gets lost.

One coordinator object at a time gets its own `reset_step`, which is DeepSpeed's own code with one name bound to another
function. Nothing in DeepSpeed's modules changes, and other engines of the process keep what they have.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Sequence
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.distributed as dist

CHECK = "assert_ints_same_as_other_ranks"
METHOD = "reset_step"
KNOWN_VERSION = "0.19.8"
FIRST = 8  # traces that are all compared


def compare_traces_within_(optimizer: Any, group: dist.ProcessGroup, *, device: torch.device) -> None:
    """Let the ZeRO-3 `optimizer` of one engine compare its module traces over `group` and not over all ranks.

    `device` is where tensors for collectives of `group` lie. Call it once the engine is made, before its first forward.
    Raises RuntimeError, saying what is missing, where this DeepSpeed does not make the check in the known way: without
    the change, stages that differ would wait for each other forever.
    """
    offload = getattr(optimizer, "parameter_offload", None)
    coordinator = getattr(offload, "param_coordinator", None)
    if coordinator is None:
        raise _unknown(f"{type(optimizer).__name__} has no parameter_offload.param_coordinator")
    method = _checked_method(type(coordinator))
    names = {**method.__globals__, CHECK: _Comparison(group, device)}
    mine = FunctionType(method.__code__, names, method.__name__, method.__defaults__, method.__closure__)
    setattr(coordinator, METHOD, MethodType(mine, coordinator))


class _Comparison:
    """What DeepSpeed calls in place of its own check: the first traces of an engine, then the 16th, 32nd, 64th, ...

    In a pipeline DeepSpeed asks at every forward, and every comparison waits for the device. What ranks do differently
    they do from the start; later on the messages would cost more than they can still find.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device
        self._asked = 0

    def __call__(self, *args: Any, **named: Any) -> None:
        # DeepSpeed's own check hides its parameters: so the call itself is looked at.
        if named or len(args) != 1:
            raise _unknown(f"{CHECK} is called with {len(args)} arguments and {sorted(named)}, not with one list of ints")
        self._asked += 1
        if self._asked <= FIRST or self._asked & (self._asked - 1) == 0:
            assert_same_within(*args, group=self._group, device=self._device)


def _checked_method(coordinator: type) -> FunctionType:
    """The method of DeepSpeed's coordinator that makes the check, after all that is relied on has been looked at."""
    where = f"{coordinator.__module__}.{coordinator.__name__}"
    using = [name for name, method in vars(coordinator).items() if CHECK in _names_in(method)]
    if using != [METHOD]:
        raise _unknown(f"{where} calls {CHECK} in {using or 'no method'}, not in {METHOD} alone")
    method = inspect.unwrap(vars(coordinator)[METHOD])
    if CHECK not in method.__globals__:
        raise _unknown(f"the module of {where} has no name {CHECK}")
    if list(inspect.signature(method).parameters) != ["self"]:
        raise _unknown(f"{where}.{METHOD} takes {inspect.signature(method)}, not (self)")
    return method


def _names_in(method: object) -> tuple[str, ...]:
    plain = inspect.unwrap(method) if callable(method) else method
    return plain.__code__.co_names if isinstance(plain, FunctionType) else ()


def _unknown(what: str) -> RuntimeError:
    return RuntimeError(
        f"ZeRO-3: {what}; llama_dist must confine that check to a pipeline stage, or ranks of different stages wait for "
        f"each other forever, and knows how for deepspeed {KNOWN_VERSION}; install that version, use parallel.zero=1 or "
        f"2, or teach llama_dist/pipeline/zero_patch.py how this one compares its traces"
    )


def assert_same_within(ints: Sequence[int], *, group: dist.ProcessGroup, device: torch.device) -> None:
    """Make sure that every rank of `group` has the same integers, up to a constant. Collective.

    Up to a constant, because DeepSpeed numbers modules and parameters through the life of a process, and two ranks may
    have held different stages before. Raises RuntimeError on every rank of the group where they differ.
    """
    if dist.get_world_size(group) == 1:
        return
    base = min(ints, default=0)
    relative = [number - base for number in ints]
    digest = zlib.crc32(repr(relative).encode())
    extremes = torch.tensor([len(ints), -len(ints), digest, -digest], dtype=torch.int64, device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    longest, shortest, largest, smallest = extremes.tolist()
    if longest == -shortest and largest == -smallest:
        return
    traces: list[list[int]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(traces, relative, group=group)
    ranks = dist.get_process_group_ranks(group)
    told = "; ".join(f"rank {rank}: {_excerpt(trace, traces[0])}" for rank, trace in zip(ranks, traces, strict=True))
    raise RuntimeError(
        f"ZeRO-3: ranks that hold the same stage went through its modules in different orders, so that they would mix up "
        f"each other's parameters; every rank must run the same forward and backward passes. {told}"
    )


def _excerpt(trace: list[int], other: list[int]) -> str:
    """The length of a trace and the few numbers at which it parts from another."""
    at = next((i for i, pair in enumerate(zip(trace, other, strict=False)) if pair[0] != pair[1]), len(other))
    return f"{len(trace)} numbers, ...{trace[max(at - 2, 0) : at + 3]} at {max(at - 2, 0)}"
