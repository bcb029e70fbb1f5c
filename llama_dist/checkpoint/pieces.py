"""Pieces: boxes of logical tensors, the currency in which a checkpoint is written and read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from llama_dist.boxes import Box, boxes_of_flat_range
from llama_dist.model.cuts import Slice
from llama_dist.pipeline.partitions import MOMENTS, Share


@dataclass(frozen=True)
class Piece:
    """`data` (shape `box.shape`) is box `box` of the logical tensor `name` of shape `shape`.

    Of several ranks that hold the same box (replicated weights, the two ends of a tied embedding) one is its `owner`,
    which saves it; all load it.
    """

    name: str
    shape: tuple[int, ...]
    box: Box
    data: Tensor
    owner: bool = True


def moment_name(moment: str, name: str) -> str:
    """The logical name of an optimizer state of the parameter `name`."""
    return f"optimizer.{moment}.{name}"


def pieces_of_shares(shares: Iterable[Share], slices: Mapping[str, Slice]) -> list[Piece]:
    """Cut a rank's shares into pieces that view them: float32 weights and both moments.

    `slices` says which part of each logical tensor the rank's tensor-parallel slice is, in which its shares lie.
    """
    pieces = []
    for share in shares:
        slice_ = slices[share.name]
        assert slice_.box.shape == share.shape, f"{share.name}: slice {slice_.box} is not the share's {share.shape}"
        states = {share.name: share.master, **{moment_name(m, share.name): getattr(share, m) for m in MOMENTS}}
        for name, flat in states.items():
            pieces += _cut(name, slice_, flat, share.start, share.stop)
    return pieces


def _cut(name: str, slice_: Slice, flat: Tensor, start: int, stop: int) -> list[Piece]:
    pieces, at = [], 0
    for box in boxes_of_flat_range(slice_.box.shape, start, stop):
        data = flat.narrow(0, at, box.numel).view(box.shape)
        pieces.append(Piece(name, slice_.shape, box.shifted(slice_.box.offset), data, slice_.owner))
        at += box.numel
    return pieces


def check_coverage(name: str, shape: tuple[int, ...], boxes: Sequence[Box]) -> None:
    """Raise ValueError unless the boxes cover a tensor of `shape` exactly once."""
    ordered = sorted(boxes, key=lambda box: box.offset)
    for i, box in enumerate(ordered):
        end = box.offset[0] + box.shape[0]
        for other in ordered[i + 1 :]:
            if other.offset[0] >= end:
                break
            if _overlap(box, other):
                raise ValueError(f"{name}: {box} and {other} overlap; two ranks would write the same elements")
    covered, total = sum(box.numel for box in boxes), prod(shape)
    if covered != total:
        raise ValueError(f"{name}: pieces cover {covered} of {total} elements; some rank's share is missing")


def _overlap(a: Box, b: Box) -> bool:
    edges = zip(a.offset, a.shape, b.offset, b.shape, strict=True)
    return all(ao < bo + bs and bo < ao + as_ for ao, as_, bo, bs in edges)
