"""What the plan of a checkpoint costs when there are as many ranks as nobody has at hand. Nothing is made but plans."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llama_dist.checkpoint.dcp import PieceSavePlanner, read_pieces
from llama_dist.checkpoint.pieces import Piece
from llama_dist.checkpoint.places import LocalPlace
from llama_dist.checkpoint.plan import SavedLayout, file_name, state_name
from llama_dist.checkpoint.saving import RECORD
from llama_dist.checkpoint.store import Position, folder_name, read_checkpoint, seal
from llama_dist.config import ModelConfig
from llama_dist.layout import Layout
from llama_dist.model.stages import stage_layers


@dataclass(frozen=True)
class Planned:
    """Seconds of the slowest rank asked for each part; bytes."""

    ranks: int
    files_opened: int
    save: float
    load: float
    manifest_made: float
    manifest_read: float
    manifest_bytes: int
    gathered: int = RECORD

    @property
    def total(self) -> float:
        return self.save + self.load + self.manifest_made + self.manifest_read


def saved_layout(model: ModelConfig, layout: Layout, zero: int) -> SavedLayout:
    layers = stage_layers(model, stages=layout.pp, seq_len=model.max_position_embeddings)
    return SavedLayout(model, layout, zero, tuple(layers))


def plan(model: ModelConfig, saved_by: Layout, loaded_by: Layout, *, zero: int, folder: Path) -> Planned:
    """Plan the save of a rank, and the load of a rank of another layout, each as if it were the first thing done."""
    save = max(_seconds(partial(_plan_save, model, saved_by, zero, rank))[0] for rank in _some(saved_by))
    loads = [_seconds(partial(_plan_load, model, saved_by, loaded_by, zero, rank)) for rank in _some(loaded_by)]
    made, text = _seconds(partial(_manifest, saved_layout(model, saved_by, zero), saved_by.world))
    name = folder_name(Position(1, 1))
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "MANIFEST.json").write_bytes(text)
    read, checkpoint = _seconds(lambda: read_checkpoint(LocalPlace(folder), name))
    assert len(checkpoint.manifest["files"]) == saved_by.world
    return Planned(
        ranks=saved_by.world,
        files_opened=max(files for _, files in loads),
        save=save,
        load=max(seconds for seconds, _ in loads),
        manifest_made=made,
        manifest_read=read,
        manifest_bytes=len(text),
    )


def _some(layout: Layout) -> Iterator[int]:
    """The first rank, the last, and one in the middle."""
    yield from sorted({0, layout.world // 2 + layout.world // 4 + 1, layout.world - 1} & set(range(layout.world)))


def _seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    done = work()
    return time.perf_counter() - began, done


def _pieces(saved: SavedLayout, rank: int) -> list[Piece]:
    """What a rank of a layout holds, without memory."""
    return [
        Piece(state_name(state, held.name), held.slice_.shape, box, torch.empty(box.shape, device="meta"))
        for state in saved.states
        for held in saved.held(rank)
        for box in held.boxes
    ]


def _plan_save(model: ModelConfig, layout: Layout, zero: int, rank: int) -> int:
    saved = saved_layout(model, layout, zero)
    plan = PieceSavePlanner(_pieces(saved, rank)).create_local_plan()
    assert sum(item.tensor_data.chunk.sizes.numel() for item in plan.items) * 4 >= saved.file_size(rank) > 0
    return len(plan.items)


def _plan_load(model: ModelConfig, saved_by: Layout, loaded_by: Layout, zero: int, rank: int) -> int:
    """How many files the rank reads from."""
    pieces = _pieces(saved_layout(model, loaded_by, zero), rank)
    files = set()
    read = read_pieces(pieces, saved_layout(model, saved_by, zero), lambda file, *_: files.add(file))
    assert read == sum(piece.data.nbytes for piece in pieces)
    return len(files)


def _manifest(saved: SavedLayout, ranks: int) -> bytes:
    files = {file_name(rank): {"bytes": 2**30 + rank, "xxh3_128": f"{rank:032x}"} for rank in range(ranks)}
    state = {"config": {"model": saved.model.model_dump()}, "layout": saved.to_json()}
    return seal({"step": 1, "samples": 1, **state, "files": files})
