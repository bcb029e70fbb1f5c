"""A run's checkpoints in an object store: saved by ranks over S3's protocol, loaded under another layout; outages."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from object_server import ObjectServer, object_server
from workers import pool, runtime

from llama_dist.checkpoint import object_place
from llama_dist.checkpoint.dcp import NotFiniteError
from llama_dist.checkpoint.pieces import Piece
from llama_dist.checkpoint.plan import SavedLayout, split_name, state_name
from llama_dist.checkpoint.saver import Saver
from llama_dist.checkpoint.saving import SaveError, save_checkpoint
from llama_dist.checkpoint.store import Position, load_pieces, newest_valid, open_place, read_checkpoint, verify
from llama_dist.config import ModelConfig
from llama_dist.layout import Layout

PART = 5 << 20  # the least that S3 takes
MODEL = ModelConfig(
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
)


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectServer]:
    with object_server() as running:
        yield running


@pytest.fixture
def where(server: ObjectServer, tmp_path: Path) -> str:
    return f"{server.url}/{tmp_path.name}"


def saved_layout(layout: Layout, zero: int) -> SavedLayout:
    layers = MODEL.num_hidden_layers // layout.pp
    return SavedLayout(MODEL, layout, zero, tuple(range(i * layers, (i + 1) * layers) for i in range(layout.pp)))


def value_of(name: str, shape: tuple[int, ...], step: int) -> torch.Tensor:
    """A logical tensor at a step: of the same numbers on every rank and in every layout."""
    seed = sum(name.encode()) * 1000 + step
    return torch.from_numpy(np.random.default_rng(seed).random(shape, dtype=np.float32))


def pieces_of(saved: SavedLayout, rank: int, step: int | None) -> list[Piece]:
    """What a rank holds: of the values at a step, or to be filled."""
    pieces = []
    for state in saved.states:
        for held in saved.held(rank):
            name, shape = state_name(state, held.name), saved.shapes[held.name]
            whole = None if step is None else value_of(name, shape, step)
            for box in held.boxes:
                data = torch.full(box.shape, torch.nan) if whole is None else whole[box.slices].contiguous()
                pieces.append(Piece(name, shape, box, data, held.slice_.owner))
    return pieces


def state_of(saved: SavedLayout) -> dict[str, Any]:
    return {"layout": saved.to_json(), "config": {"model": MODEL.model_dump(mode="json")}}


def save_on_rank(environment: dict[str, str], where: str, layout: Layout, zero: int, steps: list[int]) -> list[str]:
    """The names of what was saved, or why it was not."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr(object_place, "PART", PART)
        groups, saved, place, answers = runtime(layout).groups, saved_layout(layout, zero), open_place(where), []
        rank = torch.distributed.get_rank()
        for step in steps:
            pieces = [piece for piece in pieces_of(saved, rank, step) if piece.owner]
            try:
                answer = save_checkpoint(
                    place, Position(step, step), pieces, state=state_of(saved), attempt=1, group=groups.control
                )
            except (SaveError, NotFiniteError) as error:
                answer = str(error)
            answers.append(answer)
        return answers


def load_on_rank(environment: dict[str, str], where: str, layout: Layout, zero: int) -> tuple[int, list[str], int]:
    """The step that was loaded, what was passed over, and the bytes that this rank read; all values are right."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        checkpoint, passed_over = newest_valid(open_place(where), group=runtime(layout).groups.control)
        pieces = pieces_of(saved_layout(layout, zero), torch.distributed.get_rank(), None)
        read = load_pieces(checkpoint, pieces)
        for piece in pieces:
            expected = value_of(piece.name, piece.shape, checkpoint.position.step)[piece.box.slices]
            assert torch.equal(piece.data, expected), f"{piece.name} {piece.box}"
        assert {split_name(piece.name)[0] for piece in pieces} == {"", "exp_avg", "exp_avg_sq"}
        return checkpoint.position.step, passed_over, read


LAYOUTS = [
    ((Layout(dp=2), 1), (Layout(dp=1, tp=2), 3)),
    ((Layout(dp=1, tp=2), 1), (Layout(dp=1, pp=2), 2)),
    ((Layout(dp=1, pp=2), 3), (Layout(dp=2), 3)),
]


@pytest.mark.parametrize(("origin", "target"), LAYOUTS, ids=str)
def test_what_one_layout_saves_another_loads(
    server: ObjectServer, where: str, origin: tuple[Layout, int], target: tuple[Layout, int]
) -> None:
    names = ["step-00000003", "step-00000007"]
    assert pool(2).run(save_on_rank, server.environment, where, *origin, [3, 7]) == [names, names]
    loaded = pool(2).run(load_on_rank, server.environment, where, *target)
    total = 4 * 3 * sum(int(np.prod(shape)) for shape in saved_layout(*target).shapes.values())
    assert [(step, passed_over) for step, passed_over, _ in loaded] == [(7, []), (7, [])]
    assert total <= sum(read for _, _, read in loaded) < 1.02 * total
    place = open_place(where)
    assert [verify(read_checkpoint(place, name)) for name in names] == [[], []]
    assert server.uploads() == []


def test_a_server_that_dies_within_a_save_leaves_the_one_before_and_the_next_goes_well(
    server: ObjectServer, where: str
) -> None:
    dp = Layout(dp=2)
    assert pool(2).run(save_on_rank, server.environment, where, dp, 1, [10]) == [["step-00000010"]] * 2
    server.gate.shut(after=8 << 20)  # of 29 MB
    try:
        (told,), (same,) = pool(2).run(save_on_rank, server.environment, where, dp, 1, [20])
        assert server.gate.is_shut
    finally:
        server.gate.open()
    assert told == same and told.startswith(f"{where}/step-00000020: not saved: {where}/step-00000020/attempt-1/rank-0000")
    place = open_place(where)
    assert place.names() == ["step-00000010"]
    assert newest_valid(place)[0].position.step == 10
    assert pool(2).run(save_on_rank, server.environment, where, dp, 1, [20]) == [["step-00000020"]] * 2
    assert [step for step, _, _ in pool(2).run(load_on_rank, server.environment, where, dp, 3)] == [20, 20]
    assert place.sweep() == []


def test_a_server_that_dies_before_the_commit_and_comes_back_within_a_run(server: ObjectServer, where: str) -> None:
    """The same place goes on after the outage, and a step that failed is saved at the second try."""
    saved, place = saved_layout(Layout(dp=1), 1), open_place(where)
    pieces = pieces_of(saved, 0, 5)

    def shut_then_allow() -> None:
        server.gate.shut()

    with pytest.raises(SaveError, match=f"{where}/step-00000005: not saved: {where}/step-00000005/MANIFEST.json: cannot be written"):
        try:
            save_checkpoint(
                place, Position(5, 5), pieces, state=state_of(saved), attempt=1, group=None, may_commit=shut_then_allow
            )
        finally:
            server.gate.open()
    assert place.names() == []
    save_checkpoint(place, Position(5, 5), pieces, state=state_of(saved), attempt=1, group=None)
    assert verify(read_checkpoint(place, "step-00000005")) == []
    assert [key.split("/")[1] for key in _keys(server, where)] == ["MANIFEST.json", "attempt-1.2"], "nothing is left over"


def _keys(server: ObjectServer, where: str) -> list[str]:
    root = where.removeprefix("s3://")
    return sorted(key.removeprefix(root + "/") for key in server.files.find(root))


def test_short_outages_are_waited_out(server: ObjectServer, where: str) -> None:
    saved, place = saved_layout(Layout(dp=1), 1), open_place(where)
    server.gate.shut()
    timer = threading.Timer(0.5, server.gate.open)
    timer.start()
    try:
        save_checkpoint(place, Position(5, 5), pieces_of(saved, 0, 5), state=state_of(saved), attempt=1, group=None)
    finally:
        timer.join()
    assert place.names() == ["step-00000005"]


def test_a_background_save_goes_to_the_store(server: ObjectServer, where: str) -> None:
    saved, place = saved_layout(Layout(dp=1), 1), open_place(where)
    assert place.names() == []  # this thread has used the place before the saver's thread does
    saver = Saver(place, attempt=1, group=None)
    pieces = pieces_of(saved, 0, 5)
    saver.save(Position(5, 5), pieces, state_of(saved), wait=False)
    saver.before_update()
    for piece in pieces:
        piece.data.fill_(-1)  # as the optimizer would
    deadline = time.monotonic() + 20
    while (ended := saver.poll()) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ended is not None and ended.error is None
    checkpoint, _ = newest_valid(place)
    blank = pieces_of(saved, 0, None)
    load_pieces(checkpoint, blank)
    assert all(torch.equal(piece.data, value_of(piece.name, piece.shape, 5)) for piece in blank)
