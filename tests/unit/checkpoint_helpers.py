"""States of tiny models, cut as the ranks of a layout hold them, and checkpoints of them, without processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_dist.boxes import Box
from llama_dist.checkpoint.dcp import write_pieces
from llama_dist.checkpoint.pieces import Piece
from llama_dist.checkpoint.places import LocalPlace, Place
from llama_dist.checkpoint.plan import STATES, SavedLayout, file_name, state_name
from llama_dist.checkpoint.saving import describe_record, record_of, save_checkpoint
from llama_dist.checkpoint.store import Checkpoint, Position, folder_name, load_pieces, newest_valid, seal
from llama_dist.config import ModelConfig
from llama_dist.layout import Layout, split_layers

State = dict[str, Tensor]


def tiny_model(**changes: Any) -> ModelConfig:
    """A model of one layer whose sizes no number of replicas divides: 7 wide, 11 tokens."""
    values = {
        "vocab_size": 11, "hidden_size": 7, "intermediate_size": 5, "num_hidden_layers": 1, "num_attention_heads": 1,
        "head_dim": 2, "max_position_embeddings": 8,
    }  # fmt: skip
    return ModelConfig(**values | changes)


def saved_layout(
    model: ModelConfig, layout: Layout, *, zero: int = 3, virtual: int = 1, states: tuple[str, ...] = STATES
) -> SavedLayout:
    layers = split_layers(model.num_hidden_layers, stages=layout.pp * virtual)
    return SavedLayout(model, layout, zero, tuple(layers), states)


ALONE = saved_layout(tiny_model(), Layout(1))


def state_at(step: int, saved: SavedLayout = ALONE) -> State:
    """All logical tensors, with values of their own at every step."""
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in saved.tensors()}


def pieces_of(state: Mapping[str, Tensor], saved: SavedLayout = ALONE, *, rank: int = 0) -> list[Piece]:
    """Copies of what a rank's file holds, in its order."""
    return [
        Piece(name, tuple(state[name].shape), box, state[name][box.slices].clone())
        for of in saved.states
        for held in saved.held(rank)
        if held.slice_.owner
        for name in [state_name(of, held.name)]
        for box in held.boxes
    ]


def blank(name: str, shape: tuple[int, ...], box: Box | None = None) -> Piece:
    """A piece to load into: the whole tensor, or a box of it."""
    box = box or Box((0,) * len(shape), shape)
    return Piece(name, shape, box, torch.full(box.shape, torch.nan))


def manifest_state(saved: SavedLayout, step: int) -> dict[str, Any]:
    """What a run would say of a checkpoint, as far as reading it goes."""
    return {
        "layout": saved.to_json(),
        "config": {"model": saved.model.model_dump(mode="json")},
        "versions": {"llama_dist": "0.1"},
        "note": f"step {step}",
    }


def save(folder: Path | Place, step: int, *, attempt: int = 1) -> Path:
    """Save as a run of one process does; returns the checkpoint's path."""
    place = folder if isinstance(folder, Place) else LocalPlace(folder)
    name = save_checkpoint(
        place,
        Position(step, 8 * step),
        pieces_of(state_at(step)),
        state=manifest_state(ALONE, step),
        attempt=attempt,
        group=None,
    )
    return Path(place.where) / name


def save_as(folder: Path, step: int, saved: SavedLayout) -> Path:
    """Write what all ranks of a layout would have written."""
    place, position = LocalPlace(folder), Position(step, 8 * step)
    name, files, state = folder_name(position), {}, state_at(step, saved)
    draft = place.draft(name, 1)
    place.begin(draft)
    for rank in range(saved.layout.world):
        with place.create(draft, file_name(rank)) as file:
            write_pieces(pieces_of(state, saved, rank=rank), file)
        files[file_name(rank)] = describe_record(record_of(file))
    body = {"step": step, "samples": position.samples, **manifest_state(saved, step), "files": files}
    place.commit(draft, name, seal(body))
    return folder / name


def load(checkpoint: Checkpoint) -> State:
    pieces = [blank(name, shape) for name, shape in checkpoint.saved.tensors()]
    load_pieces(checkpoint, pieces)
    return {piece.name: piece.data for piece in pieces}


def assert_holds(checkpoint: Checkpoint) -> int:
    """The checkpoint holds its step's bits, and says so; returns the step."""
    step = checkpoint.position.step
    assert checkpoint.position.samples == 8 * step
    assert checkpoint.manifest["note"] == f"step {step}"
    expected = state_at(step, checkpoint.saved)
    loaded = load(checkpoint)
    assert loaded.keys() == expected.keys()
    for name, tensor in loaded.items():
        assert torch.equal(tensor, expected[name]), name
    return step


def assert_loads(folder: Path, steps: set[int]) -> int:
    """The newest valid checkpoint is one of `steps` and holds that step's bits; returns which."""
    checkpoint, _ = newest_valid(LocalPlace(folder))
    assert checkpoint is not None
    step = assert_holds(checkpoint)
    assert step in steps
    return step


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
