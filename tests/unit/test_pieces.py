"""Shares become boxes of logical tensors, as views, that cover each tensor exactly once."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
import torch
from checkpoint_helpers import ALONE, pieces_of, saved_layout, state_at, tiny_model

from llama_dist.boxes import Box, slice_box
from llama_dist.checkpoint.pieces import Piece, check_coverage, check_shares, pieces_of_shares
from llama_dist.checkpoint.plan import SavedLayout
from llama_dist.layout import Layout
from llama_dist.model.cuts import Slice, cut_of
from llama_dist.pipeline.partitions import Share

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
    assert [float(piece.data.view(-1)[0]) for piece in pieces[::3]] == [4.0, 1004.0, 2004.0]
    assert [piece.box for piece in pieces[:3]] == [Box((0, 4), (1, 2)), Box((1, 0), (2, 6)), Box((3, 0), (1, 2))]
    assert all(piece.shape == (8, 6) and tuple(piece.data.shape) == piece.box.shape for piece in pieces)
    pieces[1].data.fill_(-1.0)
    assert share.master[2:14].eq(-1).all() and not share.master[:2].eq(-1).any()
    assert share.exp_avg.min() > 0


def test_a_state_of_all_parameters_comes_before_the_next_state() -> None:
    shares = [share_of(NORM, (6,), 0, 6, base=0.0), share_of(O, (6, 8), 0, 48, base=0.0)]
    states = ("", "optimizer.exp_avg.", "optimizer.exp_avg_sq.")
    pieces = pieces_of_shares(shares, slices_of())
    assert [piece.name for piece in pieces] == [state + name for state in states for name in (NORM, O)]


def shares_of(saved: SavedLayout, rank: int) -> tuple[list[Share], dict[str, Slice]]:
    """What a rank holds when all is as the layout says."""
    shares, slices = [], {}
    for held in saved.held(rank):
        flat = torch.zeros(held.stop - held.start)
        shares.append(Share(held.name, held.slice_.box.shape, held.start, held.stop, flat, flat, flat))
        slices[held.name] = held.slice_
    return shares, slices


def test_pieces_are_written_in_the_order_of_the_layout() -> None:
    """The one order that readers know of."""
    for zero, rank in itertools.product((1, 3), range(3)):
        saved = saved_layout(tiny_model(), Layout(3), zero=zero)
        pieces = [piece for piece in pieces_of_shares(*shares_of(saved, rank)) if piece.owner]
        expected = pieces_of(state_at(1, saved), saved, rank=rank)
        assert [(p.name, p.shape, p.box) for p in pieces] == [(p.name, p.shape, p.box) for p in expected]
        assert sum(4 * piece.data.numel() for piece in pieces) == saved.file_size(rank)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_shares_as_the_layout_says_are_good(zero: int) -> None:
    sizes = {"vocab_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 6}
    model = tiny_model(**sizes, tie_word_embeddings=True)
    saved = saved_layout(model, Layout(2, tp=2, pp=2), zero=zero)
    for rank in range(8):
        check_shares(*shares_of(saved, rank), saved, rank)


def other_range(shares: list[Share], slices: dict[str, Slice]) -> None:
    share = shares[3]
    shares[3] = Share(share.name, share.shape, share.start, share.stop - 1, *[share.master[1:]] * 3)


def other_order(shares: list[Share], slices: dict[str, Slice]) -> None:
    shares[2], shares[3] = shares[3], shares[2]


def other_owner(shares: list[Share], slices: dict[str, Slice]) -> None:
    slice_ = slices[shares[3].name]
    slices[shares[3].name] = Slice(slice_.box, slice_.shape, not slice_.owner, slice_.copies)


def last_one_missing(shares: list[Share], slices: dict[str, Slice]) -> None:
    del shares[-1]


def one_too_many(shares: list[Share], slices: dict[str, Slice]) -> None:
    shares.append(shares[-1])


def none_at_all(shares: list[Share], slices: dict[str, Slice]) -> None:
    shares.clear()


@pytest.mark.parametrize(
    "change", [other_range, other_order, other_owner, last_one_missing, one_too_many, none_at_all]
)
def test_shares_that_are_otherwise_end_the_run_before_it_saves(change: Callable[..., None]) -> None:
    """Or it would write checkpoints that nobody can read."""
    shares, slices = shares_of(ALONE, 0)
    change(shares, slices)
    with pytest.raises(RuntimeError, match=r"rank 0: DeepSpeed gave it .* and .*plan.py says .*ZeRO-3"):
        check_shares(shares, slices, ALONE, 0)


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
