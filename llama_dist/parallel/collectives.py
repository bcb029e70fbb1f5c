"""Collectives that autograd can go through, each with the group that it runs on; no input is ever written to.

Every rank of the group must call the same ones in the same order; the backward then runs theirs in the same order too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

SEQUENCE = 1  # the dimension of positions in (batch, T, hidden)


def sum_gradient(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Forward: identity. Backward: sum over the group, whose ranks each use the same x for a part of the result."""
    return _SumGradient.apply(x, group)


def reduce_from(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Forward: sum over the group. Backward: identity."""
    return _ReduceFrom.apply(x, group)


def gather_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Forward: every rank's (B, T / ranks, ...) -> (B, T, ...). Backward: of the sum, each rank its part."""
    return _GatherSequence.apply(x, group)


def scatter_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Forward: sum of (B, T, ...) over the group, of which each rank its (B, T / ranks, ...). Backward: all parts."""
    return _ScatterSequence.apply(x, group)


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Forward: identity. Backward: times `factor`."""
    return _ScaleGradient.apply(x, factor)


def all_to_all(x: Tensor, group: dist.ProcessGroup, *, split: int, join: int) -> Tensor:
    """Forward: part i of dimension `split` goes to rank i, what arrives is joined along `join`. Backward: the reverse.

    With `split` the heads and `join` the sequence: all heads of a part of the sequence become a part of the heads of
    the whole sequence (DeepSpeed-Ulysses, Jacobs et al. 2023).
    """
    return _AllToAll.apply(x, group, split, join)


class _SumGradient(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _summed(gradient, ctx.group), None


class _ReduceFrom(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _GatherSequence(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return gathered(x, group, dim=SEQUENCE)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _summed_part(gradient, ctx.group), None


class _ScatterSequence(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _summed_part(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gathered(gradient, ctx.group, dim=SEQUENCE), None


class _ScaleGradient(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


class _AllToAll(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, split: int, join: int) -> Tensor:
        ctx.group, ctx.split, ctx.join = group, split, join
        return _exchanged(x, group, split=split, join=join)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(gradient, ctx.group, split=ctx.join, join=ctx.split), None, None, None


def gathered(x: Tensor, group: dist.ProcessGroup, *, dim: int) -> Tensor:
    """The ranks' tensors joined along `dim`, without a gradient."""
    size = dist.get_world_size(group)
    parts = x.new_empty((size, *x.shape))
    # gloo takes the ranks' tensors one after the other, not stacked.
    dist.all_gather_single(parts.flatten(0, 1), x.contiguous(), group=group)
    return parts.movedim(0, dim).flatten(dim, dim + 1)


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _summed_part(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's part, along the sequence, of the sum over the group."""
    parts = _parts(x, dist.get_world_size(group), SEQUENCE)
    part = parts.new_empty(parts.shape[1:])
    dist.reduce_scatter_single(part, parts.flatten(0, 1), group=group)
    return part


def _exchanged(x: Tensor, group: dist.ProcessGroup, *, split: int, join: int) -> Tensor:
    sent = _parts(x, dist.get_world_size(group), split)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received.movedim(0, join).flatten(join, join + 1)


def _parts(x: Tensor, size: int, dim: int) -> Tensor:
    """The `size` equal parts of dimension `dim`, stacked in memory as collectives send them."""
    assert x.shape[dim] % size == 0, f"dimension {dim} of {tuple(x.shape)} does not split over {size} ranks"
    return x.unflatten(dim, (size, -1)).movedim(dim, 0).contiguous()
