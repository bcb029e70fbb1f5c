"""Saves to the disks of nodes: what is left after a node was lost is loaded on any layout, and what is damaged is not."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import (
    Case,
    State,
    assemble,
    coordinator_on_rank,
    on_ranks,
    position_at,
    restore_on_rank,
    state_on_rank,
    steps_on_rank,
)
from workers import runtime

from llama_dist import files
from llama_dist.checkpoint.places import MANIFEST

STEPS = 2


def assert_same_bits(a: State, b: State) -> None:
    assert a.keys() == b.keys()
    for name in a:
        for key in a[name]:
            assert np.array_equal(a[name][key], b[name][key]), f"{key} of {name}"


def on_node(case: Case, rank: int, nodes: int) -> None:
    """Ranks that follow each other share a node."""
    os.environ["NODE"] = str(rank * nodes // case.world)


def save_on_rank(case: Case, nodes: int) -> tuple[Any, list[tuple[float, float]]]:
    coordinator = build_on_rank(case, nodes)
    steps_on_rank(coordinator, case, restore_on_rank(coordinator), STEPS)
    state = state_on_rank(coordinator)
    coordinator.save(position_at(STEPS), local=True)
    curve = steps_on_rank(coordinator, case, position_at(STEPS), 1)
    coordinator.saves.finish()
    assert coordinator.saves.saved_at == STEPS
    return state, curve


def build_on_rank(case: Case, nodes: int) -> Any:
    on_node(case, runtime(case.layout, kv_heads=case.kv_heads).rank, nodes)
    return coordinator_on_rank(case, with_ledger=True)


def load_on_rank(case: Case, nodes: int) -> tuple[int, Any, list[tuple[float, float]]]:
    coordinator = build_on_rank(case, nodes)
    position = restore_on_rank(coordinator)
    state = state_on_rank(coordinator)
    return position.step, state, steps_on_rank(coordinator, case, position, 1)


def case_in(folder: Path, **settings: Any) -> Case:
    return Case(micro_batch=2, folder=str(folder / "run"), local=str(folder / "disks" / "$NODE"), **settings)


def disk(folder: Path, node: int) -> Path:
    """The run's folder on a node's disk."""
    (found,) = (folder / "disks" / str(node)).iterdir()
    return found


def lose(folder: Path, node: int) -> None:
    shutil.rmtree(folder / "disks" / str(node))


LAYOUTS = [
    (dict(dp=4, zero=3), 4, dict(dp=4, zero=3), 4),
    (dict(dp=4, zero=3), 2, dict(tp=2, pp=2, zero=1), 2),
    (dict(dp=2, tp=2, zero=2), 4, dict(dp=4, zero=1), 3),
    (dict(pp=2, zero=1), 2, dict(dp=4, zero=3), 3),
    (dict(dp=2, pp=2, zero=3), 2, dict(zero=1), 1),
]


@pytest.mark.parametrize(("origin", "nodes", "target", "nodes_then"), LAYOUTS, ids=str)
def test_a_lost_node_is_made_up_for_by_the_next_one(
    tmp_path: Path, origin: dict[str, Any], nodes: int, target: dict[str, Any], nodes_then: int
) -> None:
    case = case_in(tmp_path, **origin)
    saved = on_ranks(case, save_on_rank, nodes)
    lose(tmp_path, nodes - 1)
    then = case_in(tmp_path, **target)
    loaded = on_ranks(then, load_on_rank, nodes_then)
    assert {step for step, _, _ in loaded} == {STEPS}
    assert_same_bits(assemble(then, [s for _, s, _ in loaded]), assemble(case, [s for s, _ in saved]))
    np.testing.assert_allclose(loaded[0][2], saved[0][1], rtol=1e-5)
    assert not list(tmp_path.glob("disks/*/*/*.partial-*"))


def test_where_two_neighbours_are_lost_the_shared_checkpoint_is_taken(tmp_path: Path) -> None:
    case = case_in(tmp_path, dp=4)
    on_ranks(case, shared_then_local_on_rank, 4)
    lose(tmp_path, 1)
    lose(tmp_path, 2)
    assert {step for step, _, _ in on_ranks(case, load_on_rank, 4)} == {1}


def shared_then_local_on_rank(case: Case, nodes: int) -> None:
    coordinator = build_on_rank(case, nodes)
    steps_on_rank(coordinator, case, restore_on_rank(coordinator), 1)
    coordinator.save(position_at(1), last=True)
    steps_on_rank(coordinator, case, position_at(1), 1)
    coordinator.save(position_at(2), last=True, local=True)


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "manifest"])
def test_a_damaged_file_is_taken_from_the_copy(tmp_path: Path, damage: str) -> None:
    case = case_in(tmp_path, dp=2)
    saved = on_ranks(case, save_on_rank, 2)
    path = disk(tmp_path, 0) / f"step-{STEPS:08d}" / (MANIFEST if damage == "manifest" else "rank-00000.bin")
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        data[len(data) // 2] ^= 4
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else data)
    if damage == "manifest":
        shutil.rmtree(disk(tmp_path, 0) / f"step-{STEPS:08d}")  # as if it had never been committed there
    loaded = on_ranks(case, load_on_rank, 2)
    assert {step for step, _, _ in loaded} == {STEPS}
    assert_same_bits(assemble(case, [s for _, s, _ in loaded]), assemble(case, [s for s, _ in saved]))
    assert loaded[0][2] == saved[0][1]


def full_disk_on_rank(case: Case, bad: int) -> list[int]:
    coordinator = build_on_rank(case, 2)
    steps_on_rank(coordinator, case, restore_on_rank(coordinator), 1)
    coordinator.save(position_at(1), last=True, local=True)
    steps_on_rank(coordinator, case, position_at(1), 1)
    write = files.HashingFile.write
    if coordinator.runtime.rank == bad:

        def fail(*args: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        files.HashingFile.write = fail
    try:
        coordinator.save(position_at(2), last=True, local=True)
    finally:
        files.HashingFile.write = write
    reached = [coordinator.saves.saved_at]
    coordinator.save(position_at(2), last=True, local=True)
    return [*reached, coordinator.saves.saved_at]


@pytest.mark.parametrize("bad", [0, 1])
def test_a_disk_that_is_full_costs_one_save(tmp_path: Path, bad: int) -> None:
    case = case_in(tmp_path, dp=2)
    assert on_ranks(case, full_disk_on_rank, bad) == [[1, 2], [1, 2]]
    for node in (0, 1):
        assert [path.name for path in disk(tmp_path, node).iterdir()] == ["step-00000002"], "the newest alone is kept"


def test_a_run_begun_anew_does_not_go_on_from_the_old_ones_state(tmp_path: Path) -> None:
    case = case_in(tmp_path, dp=2)
    on_ranks(case, save_on_rank, 2)
    shutil.rmtree(case.folder)
    assert {step for step, _, _ in on_ranks(case, load_on_rank, 2)} == {0}


def test_one_node_keeps_no_copies(tmp_path: Path) -> None:
    case = case_in(tmp_path, dp=2)
    on_ranks(case, save_on_rank, 1)
    assert sorted(path.name for path in (disk(tmp_path, 0) / f"step-{STEPS:08d}").iterdir()) == [
        MANIFEST,
        "rank-00000.bin",
        "rank-00001.bin",
    ]
    assert {step for step, _, _ in on_ranks(replace(case, dp=1), load_on_rank, 1)} == {STEPS}
