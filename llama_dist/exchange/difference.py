"""Two sets of weights compared by logical tensor, a block at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt

import torch

from llama_dist.exchange.weights import Weights, rows_of


@dataclass(frozen=True)
class Difference:
    """How a logical tensor differs between A and B.

    `problem` where it cannot be compared: it is in one of them only, or has another shape. Otherwise `largest` is the
    largest difference of an element, and `relative` the norm of all differences over the norm of A.
    """

    name: str
    equal: bool
    problem: str = ""
    largest: float = 0.0
    relative: float = 0.0


def differences(a: Weights, b: Weights) -> Iterator[Difference]:
    """Every logical tensor of either, in the order of A. Raises UserError where one cannot be read."""
    ours, theirs = a.tensors(), b.tensors()
    for name, shape in ours.items():
        if name not in theirs:
            yield Difference(name, False, "is only in A")
        elif theirs[name] != shape:
            yield Difference(name, False, f"shape {shape} in A, {theirs[name]} in B")
        else:
            yield _compared(a, b, name, shape)
    for name in theirs:
        if name not in ours:
            yield Difference(name, False, "is only in B")


def _compared(a: Weights, b: Weights, name: str, shape: tuple[int, ...]) -> Difference:
    equal, largest, squares, norm = True, 0.0, 0.0, 0.0
    for start, stop in rows_of(shape):
        left, right = a.read(name, start, stop), b.read(name, start, stop)
        norm += float(left.double().square().sum())
        if torch.equal(left.contiguous().view(torch.int32), right.contiguous().view(torch.int32)):
            continue  # compared as bits: of -0.0 and 0.0, and of what is no number, only these tell
        equal = False
        off = (left.double() - right.double()).abs()
        largest = max(largest, float(off.max()))
        squares += float(off.square().sum())
    relative = sqrt(squares / norm) if norm else (float("inf") if squares else 0.0)
    return Difference(name, equal, largest=largest, relative=relative)
