"""Pieces through torch's distributed checkpoint: raw bytes where the layout says, read by box, whoever wrote them."""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_helpers import ALONE, State, blank, pieces_of, saved_layout, state_at, tiny_model
from torch import Tensor

from llama_dist.boxes import Box
from llama_dist.checkpoint import dcp
from llama_dist.checkpoint.dcp import NotFiniteError, PieceSavePlanner, read_pieces, write_pieces
from llama_dist.checkpoint.pieces import Piece
from llama_dist.checkpoint.plan import SavedLayout, file_name
from llama_dist.layout import Layout

SIZES = {"num_hidden_layers": 2, "vocab_size": 8, "intermediate_size": 6, "num_attention_heads": 2}
MODEL = tiny_model(**SIZES, tie_word_embeddings=True)
LAYOUTS = [(Layout(1), 3), (Layout(3), 1), (Layout(2, pp=2), 3), (Layout(1, tp=2, cp=2), 2), (Layout(2, tp=2, pp=2), 1)]
HEAD, NORM = "lm_head.weight", "model.norm.weight"  # (11, 7) and (7,) in ALONE


class Memory:
    """Files in memory: sinks to write them, and what was read of them."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, Box]] = []
        self.bytes_asked = 0
        self._buffer = b""

    def write(self, data: Any) -> None:
        self._buffer += bytes(memoryview(data).cast("B"))

    def save(self, saved: SavedLayout, state: State) -> None:
        for rank in range(saved.layout.world):
            self.save_pieces(pieces_of(state, saved, rank=rank), rank)

    def save_pieces(self, pieces: Sequence[Piece], rank: int = 0) -> None:
        self._buffer = b""
        write_pieces(pieces, self)
        self.files[file_name(rank)] = self._buffer

    def read(self, file: str, start: int, shape: tuple[int, ...], part: Box, into: Tensor) -> None:
        assert into.device.type == "cpu" and into.is_contiguous() and into.dtype == torch.float32
        assert tuple(into.shape) == part.shape
        self.asked.append((file, part))
        self.bytes_asked += into.nbytes
        whole = np.frombuffer(self.files[file], "<f4", int(np.prod(shape)), offset=start).reshape(shape)
        into.numpy()[...] = whole[part.slices]


@pytest.mark.parametrize(
    ("wrote", "reads"), list(itertools.product(LAYOUTS, repeat=2)), ids=lambda one: f"{one[0]} zero={one[1]}"
)
def test_any_layout_is_read_by_any_other_and_every_byte_once(
    wrote: tuple[Layout, int], reads: tuple[Layout, int]
) -> None:
    saved, wanted = (saved_layout(MODEL, layout, zero=zero) for layout, zero in (wrote, reads))
    state, memory, read = state_at(4, saved), Memory(), 0
    memory.save(saved, state)
    assert {name: len(data) for name, data in memory.files.items()} == {
        file_name(rank): saved.file_size(rank) for rank in range(saved.layout.world)
    }
    for rank in range(wanted.layout.world):
        pieces = pieces_of(state, wanted, rank=rank)
        for piece in pieces:
            piece.data.fill_(torch.nan)
        read += read_pieces(pieces, saved, memory.read)
        for piece in pieces:
            assert torch.equal(piece.data, state[piece.name][piece.box.slices])
    assert read == memory.bytes_asked == 4 * sum(tensor.numel() for tensor in state.values())


def test_only_the_bytes_of_the_asked_boxes_are_read() -> None:
    saved, chosen = saved_layout(tiny_model(), Layout(3), zero=1), random.Random(2)
    state, memory = state_at(4, saved), Memory()
    memory.save(saved, state)
    for _ in range(50):
        wanted = []
        for name, shape in chosen.sample(list(saved.tensors()), 3):
            offset = tuple(chosen.randrange(size) for size in shape)
            box = Box(offset, tuple(chosen.randint(1, n - at) for n, at in zip(shape, offset, strict=True)))
            wanted.append(blank(name, shape, box))
        memory.bytes_asked = 0
        assert read_pieces(wanted, saved, memory.read) == 4 * sum(piece.box.numel for piece in wanted)
        assert memory.bytes_asked == 4 * sum(piece.box.numel for piece in wanted)
        for piece in wanted:
            assert torch.equal(piece.data, state[piece.name][piece.box.slices])


def test_files_are_read_one_after_the_other_and_from_front_to_back() -> None:
    saved = saved_layout(tiny_model(), Layout(3), zero=1)
    memory = Memory()
    memory.save(saved, state_at(4, saved))
    wanted = [blank(name, shape) for name, shape in saved.tensors()]
    random.Random(0).shuffle(wanted)
    read_pieces(wanted, saved, memory.read)
    files = [file for file, _ in memory.asked]
    assert files == sorted(files) and len(set(files)) == 3


@pytest.mark.parametrize("block", [1, 3, 8, 1 << 20])
def test_blocks_of_any_size_make_the_same_bytes(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    state, memory = state_at(4), Memory()
    monkeypatch.setattr(dcp, "BLOCK", block)
    memory.save(ALONE, state)
    raw = b"".join(piece.data.numpy().tobytes() for piece in pieces_of(state))
    assert memory.files == {"rank-00000.bin": raw}
    wanted = [blank(name, shape) for name, shape in ALONE.tensors()]
    read_pieces(wanted, ALONE, memory.read)
    assert all(torch.equal(piece.data, state[piece.name]) for piece in wanted)
    largest = max(part.numel for _, part in memory.asked)
    assert largest <= max(block, 7), "no more than a block, or a row, is under way"


def test_pieces_to_load_into_may_be_views_of_larger_buffers() -> None:
    state, memory = state_at(4), Memory()
    memory.save(ALONE, state)
    buffer, columns = torch.zeros(100), torch.zeros(11, 9)
    whole = Box((0, 0), (11, 7))
    wanted = [
        Piece(HEAD, (11, 7), whole, buffer[2:79].view(11, 7)),
        Piece("model.embed_tokens.weight", (11, 7), whole, columns[:, 1:8]),
        Piece(f"optimizer.exp_avg.{HEAD}", (11, 7), whole, torch.zeros(7, 11).t()),
    ]
    read_pieces(wanted, ALONE, memory.read)
    for piece in wanted:
        assert torch.equal(piece.data, state[piece.name])
    assert buffer[:2].eq(0).all() and buffer[79:].eq(0).all()
    assert columns[:, 0].eq(0).all() and columns[:, 8].eq(0).all()


def flat_pieces(state: Tensor, starts: Sequence[int]) -> list[Piece]:
    """Rows of seven elements of one buffer, as pieces of one tensor in the order given."""
    rows = len(starts)
    return [
        Piece(HEAD, (rows, 7), Box((i, 0), (1, 7)), state[start : start + 7].view(1, 7))
        for i, start in enumerate(starts)
    ]


@pytest.mark.parametrize(
    "starts",
    [[0, 7, 14, 21], [21, 14, 7, 0], [0, 7, 21, 28], [0, 6, 13], [0, 8, 15], [0, 7, 0, 7], [5]],
    ids=str,
)
@pytest.mark.parametrize("block", [3, 10, 1 << 20])
def test_what_lies_together_in_memory_is_written_as_what_does_not(
    monkeypatch: pytest.MonkeyPatch, starts: list[int], block: int
) -> None:
    monkeypatch.setattr(dcp, "BLOCK", block)
    buffer, memory = torch.arange(40.0), Memory()
    memory.save_pieces(flat_pieces(buffer, starts))
    expected = np.concatenate([buffer[start : start + 7].numpy() for start in starts])
    assert memory.files["rank-00000.bin"] == expected.tobytes()


def test_pieces_to_save_may_be_strided() -> None:
    base, memory = torch.randn(9, 20), Memory()
    pieces = [
        Piece("w", (20, 9), Box((0, 0), (20, 9)), base.t()),
        Piece("v", (9, 4), Box((0, 0), (9, 4)), base[:, 3:7]),
        Piece("u", (9, 4), Box((0, 0), (9, 4)), base[:, 7:11]),
        Piece("e", (3,), Box((0,), (3,)), base[0, :1].expand(3)),
    ]
    memory.save_pieces(pieces)
    raw = b"".join(piece.data.contiguous().numpy().tobytes() for piece in pieces)
    assert memory.files["rank-00000.bin"] == raw


@pytest.mark.parametrize(
    ("piece", "told"),
    [
        (blank("absent", (2,)), "the checkpoint has no tensor 'absent'; was it saved from another model"),
        (blank("optimizer.momentum.model.norm.weight", (7,)), "has no tensor 'optimizer.momentum.model.norm.weight'"),
        (blank(NORM, (5,)), rf"{NORM}: the checkpoint has shape \(7,\), the model \(5,\)"),
        (blank(HEAD, (7, 11)), rf"{HEAD}: the checkpoint has shape \(11, 7\), the model \(7, 11\)"),
    ],
)
def test_what_is_not_there_is_named(piece: Piece, told: str) -> None:
    memory = Memory()
    memory.save(ALONE, state_at(1))
    with pytest.raises(ValueError, match=told):
        read_pieces([piece], ALONE, memory.read)
    assert memory.asked == []


def test_a_checkpoint_of_weights_alone_is_read_for_its_weights() -> None:
    saved = saved_layout(tiny_model(), Layout(2), states=("",))
    state, memory = state_at(4, saved), Memory()
    memory.save(saved, state)
    wanted = blank(HEAD, (11, 7))
    read_pieces([wanted], saved, memory.read)
    assert torch.equal(wanted.data, state[HEAD])
    with pytest.raises(ValueError, match="has no tensor 'optimizer.exp_avg.lm_head.weight'"):
        read_pieces([blank(f"optimizer.exp_avg.{HEAD}", (11, 7))], saved, memory.read)


def test_two_pieces_at_one_place_are_a_defect() -> None:
    piece = blank(NORM, (7,))
    with pytest.raises(AssertionError, match="begin at the same place"):
        PieceSavePlanner([piece, piece])


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("at", [0, 30, 76])
def test_values_that_are_no_numbers_are_refused(monkeypatch: pytest.MonkeyPatch, bad: float, at: int) -> None:
    monkeypatch.setattr(dcp, "BLOCK", 16)
    state = state_at(4)
    state[f"optimizer.exp_avg.{HEAD}"].view(-1)[at] = bad
    with pytest.raises(NotFiniteError, match=f"^optimizer.exp_avg.{HEAD} holds values that are not finite numbers$"):
        Memory().save(ALONE, state)


def test_infinities_that_cancel_are_found_and_numbers_whose_sum_is_none_are_saved() -> None:
    state, memory = state_at(4), Memory()
    state[NORM][:2] = torch.tensor([torch.inf, -torch.inf])
    with pytest.raises(NotFiniteError):
        memory.save(ALONE, state)
    state[NORM].fill_(3e38)
    memory.save(ALONE, state)
    wanted = blank(NORM, (7,))
    read_pieces([wanted], ALONE, memory.read)
    assert wanted.data.eq(3e38).all()


def test_errors_of_the_storage_come_through_as_they_are() -> None:
    class Full:
        def write(self, data: Any) -> None:
            raise OSError(28, "No space left on device")

    def gone(*args: Any) -> None:
        raise OSError("rank-00000.bin: gone")

    with pytest.raises(OSError, match="No space left"):
        write_pieces(pieces_of(state_at(1)), Full())
    with pytest.raises(OSError, match="^rank-00000.bin: gone$"):
        read_pieces([blank(NORM, (7,))], ALONE, gone)


def test_nobody_is_warned_of_what_is_meant() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        memory = Memory()
        memory.save(ALONE, state_at(1))
        read_pieces([blank(NORM, (7,))], ALONE, memory.read)
    assert [str(one.message) for one in told] == []
