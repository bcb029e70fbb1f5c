"""Boxes: where a piece of a logical tensor lies. Integers only, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import prod


class Cut(Enum):
    """How tensor parallelism cuts a weight: not at all, along dimension 0, or along dimension 1."""

    NONE = None
    DIM0 = 0
    DIM1 = 1


@dataclass(frozen=True)
class Box:
    """A rectangular piece of a tensor: `offset[d] <= index[d] < offset[d] + shape[d]`."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(o, o + s) for o, s in zip(self.offset, self.shape, strict=True))

    def shifted(self, by: tuple[int, ...]) -> Box:
        """The same piece seen from a tensor in which this box's tensor begins at `by`."""
        return Box(tuple(o + b for o, b in zip(self.offset, by, strict=True)), self.shape)


def slice_box(shape: tuple[int, ...], *, cut: Cut, parts: int, part: int) -> Box:
    """The box of part `part` out of `parts` equal slices of a logical tensor along `cut`."""
    if cut is Cut.NONE:
        return Box((0,) * len(shape), shape)
    dim = cut.value
    assert shape[dim] % parts == 0, f"dimension {dim} of {shape} does not split into {parts} equal slices"
    size = shape[dim] // parts
    offset = tuple(part * size if d == dim else 0 for d in range(len(shape)))
    return Box(offset, tuple(size if d == dim else n for d, n in enumerate(shape)))


def boxes_of_flat_range(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """Cut elements [start, stop) of a row-major tensor into boxes, in flat order.

    At most `2 * len(shape) - 1` boxes: a matrix gives a partial first row, whole rows, and a partial last row.
    """
    if start >= stop:
        return []
    if len(shape) == 1:
        return [Box((start,), (stop - start,))]
    row = prod(shape[1:])
    first_row, first_within = divmod(start, row)
    last_row, last_within = divmod(stop, row)
    if first_row == last_row:
        return _in_row(shape, first_row, first_within, last_within)

    boxes: list[Box] = []
    if first_within:
        boxes += _in_row(shape, first_row, first_within, row)
        first_row += 1
    if first_row < last_row:
        boxes.append(Box((first_row,) + (0,) * (len(shape) - 1), (last_row - first_row, *shape[1:])))
    return boxes + _in_row(shape, last_row, 0, last_within)


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> list[Box]:
    """The boxes of elements [start, stop) of one row, counted within that row."""
    inner = boxes_of_flat_range(shape[1:], start, stop)
    return [Box((row, *box.offset), (1, *box.shape)) for box in inner]
