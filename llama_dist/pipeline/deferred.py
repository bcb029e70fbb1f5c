"""Gradients of weights, computed later than those of activations (Qi et al. 2023, "Zero Bubble Pipeline Parallelism").

A deferred model's backward computes what the stage before is waiting for, and notes for every weight what its gradient
will be made of: the input and the output's gradient of a linear map, the ids and the gradient of an embedding, the
gradient itself of a vector. No weight gets a gradient then, so that no hook of DeepSpeed's runs. `hand_over` makes a
scalar of such notes whose backward computes the gradients one after the other and gives each to its weight: DeepSpeed
reduces, partitions and accumulates them as in any backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from llama_dist.model.llama import Embedding, Linear, RMSNorm

Terms = dict[nn.Parameter, list[Callable[[], Tensor]]]  # what to add up for the gradient of each weight


class WeightGradients:
    """Where the weights of one model note their gradients while a backward of a micro-batch runs."""

    def __init__(self) -> None:
        self._noting: Terms | None = None
        self._root = torch.empty(0, requires_grad=True)  # so that everything has a gradient, also what follows from ids

    def defer_(self, model: nn.Module) -> None:
        """From now on gradients of the weights of `model`, all in modules of model/llama.py's kinds, are noted."""
        for name, module in model.named_modules():
            if isinstance(module, Linear):
                module.multiply = self._multiply
            elif isinstance(module, Embedding):
                module.look_up = self._look_up
            elif isinstance(module, RMSNorm):
                # The forward is wrapped and not the module, so that parameters keep their names and ZeRO-3 its hooks.
                module.forward = partial(self._with_stand_in, module, module.forward)
            else:
                assert not module._parameters, f"{name}: the weights of a {type(module).__name__} cannot be deferred"

    @contextmanager
    def noting(self) -> Iterator[Terms]:
        """Run one backward inside; it fills what is given, which then keeps what the gradients are made of alive."""
        assert self._noting is None, "one backward at a time notes its gradients"
        self._noting = {}
        try:
            yield self._noting
        finally:
            self._noting = None

    def _multiply(self, x: Tensor, weight: nn.Parameter) -> Tensor:
        return _Multiply.apply(self._root, x, self._noted(weight))

    def _look_up(self, ids: Tensor, weight: nn.Parameter) -> Tensor:
        return _LookUp.apply(self._root, ids, self._noted(weight))

    def _with_stand_in(self, module: nn.Module, forward: Callable[..., Tensor], *args: Any) -> Tensor:
        """`forward` with a stand-in for the module's weight, which notes the gradient that comes back to it."""
        vars(module)["weight"] = _StandIn.apply(self._root, self._noted(module.weight))
        try:
            return forward(*args)
        finally:
            del vars(module)["weight"]

    def _noted(self, weight: nn.Parameter) -> _NotedWeight:
        return _NotedWeight(weight, partial(self._note, weight))

    def _note(self, weight: nn.Parameter, term: Callable[[], Tensor]) -> None:
        assert self._noting is not None, "a backward of a deferred model must run inside of noting()"
        self._noting.setdefault(weight, []).append(term)


class _NotedWeight(NamedTuple):
    """A weight as the functions below take it: not as a tensor, or autograd would run its hooks with no gradient."""

    weight: nn.Parameter
    note: Callable[[Callable[[], Tensor]], None]


class _Multiply(Function):
    @staticmethod
    def forward(ctx: Any, root: Tensor, x: Tensor, noted: _NotedWeight) -> Tensor:
        # The weight is saved and not only named: where activations are recomputed, ZeRO-3 lets go of it in between.
        ctx.save_for_backward(x, noted.weight)
        ctx.note = noted.note
        return nn.functional.linear(x, noted.weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        ctx.note(lambda: gradient.flatten(0, -2).t() @ x.flatten(0, -2))
        return None, gradient @ weight if ctx.needs_input_grad[1] else None, None


class _LookUp(Function):
    @staticmethod
    def forward(ctx: Any, root: Tensor, ids: Tensor, noted: _NotedWeight) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.note, ctx.rows = noted.note, len(noted.weight)
        return nn.functional.embedding(ids, noted.weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        (ids,), rows = ctx.saved_tensors, ctx.rows
        # What autograd itself calls: (gradient, ids, rows, no padding row, not scaled by frequency).
        ctx.note(lambda: torch.ops.aten.embedding_dense_backward(gradient, ids, rows, -1, False))
        return None, None, None


class _StandIn(Function):
    @staticmethod
    def forward(ctx: Any, root: Tensor, noted: _NotedWeight) -> Tensor:
        ctx.note = noted.note
        return noted.weight.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        ctx.note(lambda: gradient)
        return None, None


@contextmanager
def hand_over(terms: Terms) -> Iterator[Tensor]:
    """A scalar for one backward inside, which gives every weight in `terms` its gradient and empties `terms`.

    A weight that ZeRO-3 has partitioned is not gathered: its values are not needed, and its shape is lent to it.
    """
    with _full_shapes(list(terms)):
        scalar = next(iter(terms)).new_zeros(()) if terms else torch.zeros(())
        # The backward goes from the last to the first: so weights come in the order in which their gradients were noted.
        for weight in reversed(terms):
            scalar = _HandOver.apply(scalar, weight, terms)
        yield scalar


class _HandOver(Function):
    @staticmethod
    def forward(ctx: Any, scalar: Tensor, weight: nn.Parameter, terms: Terms) -> Tensor:
        ctx.weight, ctx.terms = weight, terms
        return scalar.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:
        terms = ctx.terms.pop(ctx.weight)
        total = terms.pop()()
        while terms:
            total = total + terms.pop()()
        return gradient if ctx.needs_input_grad[0] else None, total, None


@contextmanager
def _full_shapes(weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let partitioned weights have their full shape, of one element seen everywhere: autograd compares shapes only."""
    partitioned = [weight for weight in weights if hasattr(weight, "ds_shape") and weight.shape != weight.ds_shape]
    kept = [weight.data for weight in partitioned]
    for weight, data in zip(partitioned, kept, strict=True):
        weight.data = data.new_zeros(()).expand(weight.ds_shape)
    try:
        yield
    finally:
        for weight, data in zip(partitioned, kept, strict=True):
            weight.data = data
