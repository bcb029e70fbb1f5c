"""Shares become boxes of logical tensors, as views, that cover each tensor exactly once."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from llama_dist.boxes import Box, slice_box
from llama_dist.checkpoint.pieces import Piece, check_coverage, moment_name, pieces_of_shares
from llama_dist.model.cuts import Slice, cut_of
from llama_dist.pipeline.partitions import MOMENTS, Share

Q = "model.layers.0.self_attn.q_proj.weight"  # cut along dimension 0 by tensor parallelism
O = "model.layers.0.self_attn.o_proj.weight"  # cut along dimension 1
NORM = "model.norm.weight"  # not cut
SHAPES = {Q: (8, 6), O: (6, 8), NORM: (6,)}


def slices_of(*, tp: int = 1, tp_rank: int = 0) -> dict[str, Slice]:
    """The rank's slice of each tensor, of which the first rank owns what all hold."""
    slices = {}
    for name, shape in SHAPES.items():
        dim = cut_of(name).value
        box = slice_box(shape, cut=cut_of(name), parts=1 if dim is None else tp, part=0 if dim is None else tp_rank)
        slices[name] = Slice(box, shape, owner=dim is not None or tp_rank == 0, copies=tp if dim is None else 1)
    return slices


def share_of(name: str, shape: tuple[int, ...], start: int, stop: int, *, base: float) -> Share:
    """A share whose element i of the slice has the value base + i."""
    flat = torch.arange(start, stop, dtype=torch.float32) + base
    return Share(name, shape, start, stop, flat, flat + 1000, flat + 2000)


def test_a_share_gives_its_weight_and_both_moments_as_views() -> None:
    share = share_of(Q, (8, 6), 4, 20, base=0.0)
    pieces = pieces_of_shares([share], slices_of())
    assert [piece.name for piece in pieces[::3]] == [Q, "optimizer.exp_avg." + Q, "optimizer.exp_avg_sq." + Q]
    assert [piece.box for piece in pieces[:3]] == [Box((0, 4), (1, 2)), Box((1, 0), (2, 6)), Box((3, 0), (1, 2))]
    assert all(piece.shape == (8, 6) and tuple(piece.data.shape) == piece.box.shape for piece in pieces)
    pieces[1].data.fill_(-1.0)
    assert share.master[2:14].eq(-1).all() and not share.master[:2].eq(-1).any()
    assert share.exp_avg.min() > 0


def test_moments_have_names_of_their_own() -> None:
    assert moment_name("exp_avg", NORM) == "optimizer.exp_avg.model.norm.weight"
    assert len({NORM, *(moment_name(m, NORM) for m in MOMENTS)}) == 3


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("dp", [1, 2, 3, 5])
def test_pieces_of_all_ranks_rebuild_each_tensor(dp: int, tp: int) -> None:
    whole = {name: torch.full(shape, torch.nan) for name, shape in SHAPES.items()}
    boxes: dict[str, list[Box]] = {name: [] for name in SHAPES}
    for tp_rank, dp_rank in itertools.product(range(tp), range(dp)):
        for name, shape in SHAPES.items():
            full = torch.arange(whole[name].numel(), dtype=torch.float32).view(shape)
            dim = cut_of(name).value
            part = full if dim is None else full.chunk(tp, dim)[tp_rank]
            flat = part.reshape(-1)
            size = -(-flat.numel() // dp)
            start, stop = min(size * dp_rank, flat.numel()), min(size * (dp_rank + 1), flat.numel())
            if start == stop:
                continue
            master = flat[start:stop].clone()
            share = Share(name, tuple(part.shape), start, stop, master, master, master)
            for piece in pieces_of_shares([share], slices_of(tp=tp, tp_rank=tp_rank)):
                if piece.name == name and piece.owner:
                    boxes[name].append(piece.box)
                    whole[name][piece.box.slices] = piece.data
    for name, shape in SHAPES.items():
        check_coverage(name, shape, boxes[name])
        assert torch.equal(whole[name], torch.arange(whole[name].numel(), dtype=torch.float32).view(shape))


def test_a_share_of_another_slice_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"shape=\(4, 6\)\) is not the share's \(8, 6\)"):
        pieces_of_shares([share_of(Q, (8, 6), 0, 4, base=0.0)], slices_of(tp=2))


def test_gaps_and_overlaps_are_named() -> None:
    left, right = Box((0, 0), (4, 3)), Box((0, 3), (4, 2))
    check_coverage("w", (4, 5), [left, right])
    with pytest.raises(ValueError, match="w: pieces cover 12 of 20 elements; some rank's share is missing"):
        check_coverage("w", (4, 5), [left])
    with pytest.raises(ValueError, match=r"w: Box.* and Box.* overlap"):
        check_coverage("w", (4, 5), [left, right, Box((3, 2), (1, 1))])
    with pytest.raises(ValueError, match="overlap"):
        check_coverage("w", (4, 5), [left, left])


def test_coverage_agrees_with_counting_every_element() -> None:
    chosen = random.Random(3)
    verdicts = []
    for _ in range(300):
        shape = (chosen.randint(1, 4), chosen.randint(1, 4))
        count = torch.zeros(shape, dtype=torch.int64)
        boxes = []
        for _ in range(chosen.randint(1, 3)):
            offset = tuple(chosen.randrange(n) for n in shape)
            size = tuple(chosen.randint(1, n - o) for n, o in zip(shape, offset, strict=True))
            boxes.append(Box(offset, size))
            count[boxes[-1].slices] += 1
        good = bool((count == 1).all())
        verdicts.append(good)
        if good:
            check_coverage("w", shape, boxes)
        else:
            with pytest.raises(ValueError):
                check_coverage("w", shape, boxes)
    assert 10 < sum(verdicts) < 290


def test_a_piece_is_where_its_box_says() -> None:
    tensor = torch.arange(48.0).view(8, 6)
    box = Box((2, 0), (3, 6))
    assert torch.equal(Piece(Q, (8, 6), box, tensor[box.slices]).data, tensor[2:5])
