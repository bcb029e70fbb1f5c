"""Pieces through torch's distributed checkpoint: raw bytes and JSON, read by box."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from llama_dist.boxes import Box, boxes_of_flat_range
from llama_dist.checkpoint.dcp import TENSORS_FILE, PieceLoadPlanner, PieceSavePlanner, RawReader, RawWriter
from llama_dist.checkpoint.pieces import Piece
from llama_dist.files import check_file

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process, as asked

WHOLE = {"w": torch.arange(35.0).view(7, 5), "v": torch.arange(4.0) - 9, "cube": torch.arange(24.0).view(2, 3, 4)}


def pieces_of(tensors: dict[str, torch.Tensor], *, parts: int) -> list[Piece]:
    pieces = []
    for name, tensor in tensors.items():
        edges = [tensor.numel() * i // parts for i in range(parts + 1)]
        for start, stop in itertools.pairwise(edges):
            for box in boxes_of_flat_range(tuple(tensor.shape), start, stop):
                pieces.append(Piece(name, tuple(tensor.shape), box, tensor[box.slices].clone()))
    return pieces


def save(folder: Path, pieces: list[Piece]) -> dict[str, Any]:
    committed: list[dict[str, Any]] = []
    writer = RawWriter(folder, rank=3, commit=committed.append)
    dcp.save({}, storage_writer=writer, planner=PieceSavePlanner(pieces), no_dist=True)
    (files,) = committed
    return files


def load(folder: Path, pieces: list[Piece]) -> int:
    reader = RawReader(folder)
    dcp.load({}, storage_reader=reader, planner=PieceLoadPlanner(pieces), no_dist=True)
    return reader.bytes_read


def blank(name: str, box: Box) -> Piece:
    return Piece(name, tuple(WHOLE[name].shape), box, torch.full(box.shape, torch.nan))


def test_the_files_hold_what_the_index_says(tmp_path: Path) -> None:
    """Read back with nothing but numpy and json, as another tool would."""
    files = save(tmp_path / "c", pieces_of(WHOLE, parts=3))
    assert sorted(files) == ["rank-00003.bin", TENSORS_FILE]
    for name, record in files.items():
        assert check_file(tmp_path / "c" / name, size=record["bytes"], checksum=record["xxh3_128"]) is None
    index = json.loads((tmp_path / "c" / TENSORS_FILE).read_text())["tensors"]
    assert index.keys() == WHOLE.keys()
    total = 0
    for name, tensor in index.items():
        assert (tensor["dtype"], tensor["shape"]) == ("float32", list(WHOLE[name].shape))
        for chunk in tensor["chunks"]:
            raw = np.fromfile(tmp_path / "c" / chunk["file"], "<f4", np.prod(chunk["shape"]), offset=chunk["start"])
            box = Box(tuple(chunk["offset"]), tuple(chunk["shape"]))
            assert np.array_equal(raw.reshape(box.shape), WHOLE[name][box.slices].numpy())
            total += raw.nbytes
    assert total == files["rank-00003.bin"]["bytes"] == 4 * sum(tensor.numel() for tensor in WHOLE.values())


@pytest.mark.parametrize(("saved", "loaded"), list(itertools.product([1, 2, 3, 5], repeat=2)))
def test_any_cut_is_read_by_any_other(tmp_path: Path, saved: int, loaded: int) -> None:
    save(tmp_path / "c", pieces_of(WHOLE, parts=saved))
    wanted = [blank(piece.name, piece.box) for piece in pieces_of(WHOLE, parts=loaded)]
    read = load(tmp_path / "c", wanted)
    for piece in wanted:
        assert torch.equal(piece.data, WHOLE[piece.name][piece.box.slices])
    assert read == 4 * sum(tensor.numel() for tensor in WHOLE.values())


def test_only_the_bytes_of_the_asked_boxes_are_read(tmp_path: Path) -> None:
    save(tmp_path / "c", pieces_of(WHOLE, parts=2))
    wanted = [blank("w", Box((2, 1), (3, 2))), blank("cube", Box((0, 1, 1), (2, 2, 2)))]
    assert load(tmp_path / "c", wanted) == 4 * (6 + 8)
    for piece in wanted:
        assert torch.equal(piece.data, WHOLE[piece.name][piece.box.slices])


def test_pieces_may_be_views_of_larger_buffers(tmp_path: Path) -> None:
    save(tmp_path / "c", [Piece("w", (7, 5), Box((0, 0), (7, 5)), WHOLE["w"].t().contiguous().t())])
    buffer = torch.zeros(40)
    load(tmp_path / "c", [Piece("w", (7, 5), Box((0, 0), (7, 5)), buffer[2:37].view(7, 5))])
    assert torch.equal(buffer[2:37].view(7, 5), WHOLE["w"])
    assert buffer[:2].eq(0).all() and buffer[37:].eq(0).all()


@pytest.mark.parametrize(
    ("piece", "told"),
    [
        (Piece("absent", (2,), Box((0,), (2,)), torch.zeros(2)), "no tensor 'absent'"),
        (Piece("v", (5,), Box((0,), (5,)), torch.zeros(5)), r"v: the checkpoint has shape \(4,\), the model \(5,\)"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, piece: Piece, told: str) -> None:
    save(tmp_path / "c", pieces_of(WHOLE, parts=2))
    with pytest.raises(CheckpointException, match=told):
        load(tmp_path / "c", [piece])


def test_gaps_and_overlaps_are_found_before_anything_is_written(tmp_path: Path) -> None:
    pieces = pieces_of(WHOLE, parts=2)
    extra = Piece("v", (4,), Box((1,), (1,)), torch.zeros(1))
    for wrong, told in ((pieces[1:], "cover"), ([*pieces, extra], "overlap")):
        with pytest.raises(CheckpointException, match=told):
            save(tmp_path / told, wrong)
        assert list((tmp_path / told).iterdir()) == []


def test_two_pieces_at_one_place_are_a_defect() -> None:
    piece = Piece("v", (4,), Box((0,), (4,)), torch.zeros(4))
    with pytest.raises(AssertionError, match="begin at the same place"):
        PieceSavePlanner([piece, piece])


def test_a_folder_that_exists_is_never_written_into(tmp_path: Path) -> None:
    save(tmp_path / "c", pieces_of(WHOLE, parts=1))
    with pytest.raises(CheckpointException, match="exists"):
        save(tmp_path / "c", pieces_of(WHOLE, parts=1))


def test_values_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    bad = {"w": WHOLE["w"].clone()}
    bad["w"][6, 4] = torch.inf
    with pytest.raises(CheckpointException, match="w holds values that are not finite"):
        save(tmp_path / "c", pieces_of(bad, parts=2))
