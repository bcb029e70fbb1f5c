"""Pieces: boxes of logical tensors, the currency in which a checkpoint is written and read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

from torch import Tensor

from llama_dist.boxes import Box
from llama_dist.checkpoint.plan import STATES, Held, SavedLayout, state_name
from llama_dist.model.cuts import Slice


class Share(Protocol):
    """`pipeline.partitions.Share`, from a file that imports DeepSpeed: seconds that a reader has no use for."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int


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


def pieces_of_shares(shares: Iterable[Share], slices: Mapping[str, Slice]) -> list[Piece]:
    """Cut a rank's shares into pieces that view them: of each state in turn, all parameters in the order given.

    `slices` says which part of each logical tensor the rank's tensor-parallel slice is, in which its shares lie.
    """
    pieces, shares = [], list(shares)
    for state in STATES:
        for share in shares:
            slice_ = slices[share.name]
            assert slice_.box.shape == share.shape, f"{share.name}: slice {slice_.box} is not the share's {share.shape}"
            flat, at = getattr(share, state or "master"), 0
            for box in Held(share.name, slice_, share.start, share.stop).boxes:
                data = flat.narrow(0, at, box.numel).view(box.shape)
                pieces.append(Piece(state_name(state, share.name), slice_.shape, box, data, slice_.owner))
                at += box.numel
    return pieces


def check_shares(shares: Iterable[Share], slices: Mapping[str, Slice], saved: SavedLayout, rank: int) -> None:
    """Raise RuntimeError where a rank does not hold just what `saved` says, which is what checkpoints are read by."""
    held = [(share.name, share.start, share.stop, slices[share.name].owner) for share in shares]
    planned = [(one.name, one.start, one.stop, one.slice_.owner) for one in saved.held(rank)]
    for found, expected in zip(held, planned, strict=False):
        if found != expected:
            break
    else:
        if len(held) == len(planned):
            return
        found, expected = f"{len(held)} parameters", f"{len(planned)} parameters"
    raise RuntimeError(
        f"rank {rank}: DeepSpeed gave it {found} (name, start, stop, owner), and llama_dist/checkpoint/plan.py says "
        f"{expected}; use deepspeed 0.19.8, or teach SavedLayout how this one partitions under ZeRO-{saved.zero}"
    )


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
