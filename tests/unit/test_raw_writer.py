"""What lies together in memory is written together, in the order of the pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llama_dist.boxes import Box
from llama_dist.checkpoint import dcp
from llama_dist.checkpoint.dcp import NotFiniteError, write_pieces
from llama_dist.checkpoint.pieces import Piece


class Recorder:
    """Keeps what it is given to write."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []

    def write(self, data: Any) -> None:
        self.writes.append(bytes(data))


def written(tensors: Sequence[Tensor]) -> list[list[float]]:
    """The float32 numbers of each write."""
    sink = Recorder()
    pieces = [Piece(f"t{i}", tuple(t.shape), Box((0,) * t.dim(), tuple(t.shape)), t) for i, t in enumerate(tensors)]
    write_pieces(pieces, sink)
    return [np.frombuffer(write, dtype=np.float32).tolist() for write in sink.writes]


def test_neighbours_in_memory_are_one_write() -> None:
    flat = torch.arange(24.0)
    assert written([flat[:6].view(2, 3), flat[6:7], flat[7:24].view(17)]) == [flat.tolist()]


def test_what_does_not_follow_is_written_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    flat, other = torch.arange(12.0), torch.arange(100.0, 104.0)
    gap, back = [flat[:3], flat[4:8]], [flat[8:12], flat[:2]]
    turned = flat[:6].view(2, 3).T  # not contiguous
    found = written([*gap, other, *back, turned])
    assert found == [[0, 1, 2], [4, 5, 6, 7], other.tolist(), [8, 9, 10, 11], [0, 1], [0, 3, 1, 4, 2, 5]]

    monkeypatch.setattr(dcp, "BLOCK", 5)
    assert written([flat[:4], flat[4:12], other]) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11], other.tolist()]


def test_a_state_that_is_not_finite_is_named_and_not_written() -> None:
    flat = torch.zeros(8)
    flat[6] = float("nan")
    sink = Recorder()
    pieces = [Piece(name, (4,), Box((0,), (4,)), part) for name, part in (("good", flat[:4]), ("bad", flat[4:]))]
    with pytest.raises(NotFiniteError, match="bad"):
        write_pieces(pieces, sink)
    assert sink.writes == []
