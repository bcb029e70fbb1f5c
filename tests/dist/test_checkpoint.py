"""What one layout saves, any other loads: the same logical tensors, the same curve; and nothing damaged is loaded."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import (
    Case,
    coordinator_on_rank,
    ledger_events,
    on_ranks,
    position_at,
    restore_on_rank,
    steps_on_rank,
)
from square import LAYOUTS, LIMIT, Outcome, gathered, load_on_rank, loading, problems_of, save_on_rank, saving
from workers import WorkerFailure, pool

from llama_dist import files
from llama_dist.checkpoint.places import MANIFEST, LocalPlace
from llama_dist.checkpoint.store import newest_valid, read_checkpoint, verify
from llama_dist.checkpoint.whole import load_model
from llama_dist.errors import UserError
from llama_dist.train.finding import find_newest

@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("checkpoints")
    saved.cache_clear()


@lru_cache
def saved(folder: Path, case: Case) -> Outcome:
    """A run that was saved after three steps and went on for three."""
    case = saving(case, folder)
    return gathered(case, on_ranks(case, save_on_rank))


def check_that_one_loads_what_another_saved(folder: Path, origin: Case, target: Case, *, rtol: float = LIMIT) -> None:
    source = saved(folder, origin)
    case = loading(source, target)
    found = gathered(case, on_ranks(case, load_on_rank))
    assert problems_of(source, found, same_layout=origin == target, limit=rtol) == []


def pairs(*offsets: int) -> list[tuple[Case, Case]]:
    """Every layout loads what those so many places before it in the list saved."""
    count = len(LAYOUTS)
    return [(LAYOUTS[i], LAYOUTS[(i + by) % count]) for i in range(count) for by in offsets]


@pytest.mark.parametrize(("origin", "target"), pairs(0, 1, 5), ids=str)
def test_any_layout_loads_what_any_saved(folder: Path, origin: Case, target: Case) -> None:
    check_that_one_loads_what_another_saved(folder, origin, target)


BFLOAT16 = [
    (Case(dp=2, zero=3), Case(dp=2, zero=3)),
    (Case(dp=2, zero=1), Case(dp=2, zero=1)),
    (Case(pp=2, zero=2), Case(pp=2, zero=2)),
    (Case(dp=2, zero=1), Case(tp=2, pp=2, zero=3)),
]


@pytest.mark.parametrize(("origin", "target"), BFLOAT16, ids=str)
def test_bfloat16_runs_go_on_from_float32_state(folder: Path, origin: Case, target: Case) -> None:
    origin, target = (replace(case, precision="bf16") for case in (origin, target))
    check_that_one_loads_what_another_saved(folder, origin, target, rtol=1e-2)


TIED = [
    (Case(dp=2, zero=3), Case(zero=1)),
    (Case(zero=2), Case(pp=2, dp=2, zero=3)),
    (Case(pp=2, tp=2, zero=1), Case(dp=2, zero=2)),
    (Case(pp=2, zero=3), Case(pp=2, zero=3)),
    (Case(pp=4, zero=1), Case(pp=2, zero=3, schedule="interleaved", virtual_stages=2)),
]


@pytest.mark.parametrize(("origin", "target"), TIED, ids=str)
def test_a_tied_head_is_saved_once_and_stays_tied(folder: Path, origin: Case, target: Case) -> None:
    origin, target = (replace(case, tied=True) for case in (origin, target))
    check_that_one_loads_what_another_saved(folder, origin, target)
    assert "lm_head.weight" not in saved(folder, origin).at_save


KV_HEADS = [(Case(tp=4, zero=3), Case(dp=2, zero=1)), (Case(dp=2, zero=2), Case(tp=4, zero=1))]


@pytest.mark.parametrize(("origin", "target"), KV_HEADS, ids=str)
def test_a_shared_key_head_is_saved_once_and_loaded_by_all(folder: Path, origin: Case, target: Case) -> None:
    origin, target = (replace(case, kv_heads=1) for case in (origin, target))
    check_that_one_loads_what_another_saved(folder, origin, target)


def test_the_save_is_read_whole_in_one_plain_process(folder: Path) -> None:
    source = saved(folder, Case(dp=2, tp=2, pp=2, zero=3, sequence_parallel=True))
    checkpoint, passed_over = newest_valid(LocalPlace(Path(source.case.folder) / "checkpoints"))
    assert passed_over == []
    for name, parameter in load_model(checkpoint).named_parameters():
        assert np.array_equal(parameter.detach().numpy(), source.at_save[name]["master"])


@pytest.mark.parametrize("case", [Case(dp=4, zero=1), Case(dp=4, zero=3), Case(pp=2, tp=2), Case(dp=2, tp=2)], ids=str)
def test_a_rank_reads_its_share_and_no_more(folder: Path, case: Case) -> None:
    source = saved(folder, Case(dp=2, zero=1))
    total = sum(a.nbytes for arrays in source.at_save.values() for a in arrays.values())
    read = [reached.read for reached in on_ranks(loading(source, case), load_on_rank)]
    # Each tensor-parallel rank reads the norms, which are small.
    assert total <= sum(read) < 1.02 * total
    assert sum(read) == total or case.tp > 1
    assert max(read) < 1.1 * total / 4


# A damaged checkpoint is named and passed over by all ranks.


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def remove(path: Path) -> None:
    path.unlink()


FILES = ("rank-00000.bin", "rank-00001.bin", MANIFEST)


def two_saves_on_rank(case: Case) -> list[tuple[float, float]]:
    coordinator = coordinator_on_rank(case)
    restore_on_rank(coordinator)
    curve = []
    for step in range(4):
        curve += steps_on_rank(coordinator, case, position_at(step), 1)
        if step in (1, 3):
            coordinator.save(position_at(step + 1), last=True)
    return curve


def go_on_on_rank(case: Case) -> tuple[int, list[str], list[tuple[float, float]]]:
    coordinator = coordinator_on_rank(case)
    found = find_newest(coordinator.run, None, group=coordinator.runtime.groups.control)
    position, passed_over = coordinator.restore(found), found.passed_over
    return position.step, passed_over, steps_on_rank(coordinator, case, position, 4 - position.step)


@lru_cache
def two_saves(folder: Path) -> tuple[Case, list[tuple[float, float]]]:
    case = Case(dp=2, folder=str(folder / "two-saves"), micro_batch=2)
    return case, on_ranks(case, two_saves_on_rank)[0]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [flip, truncate, empty, remove])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    folder: Path, tmp_path: Path, damage: Any, file: str
) -> None:
    case, curve = two_saves(folder)
    run = tmp_path / "run"
    shutil.copytree(case.folder, run)
    newest = run / "checkpoints" / "step-00000004"
    damage(newest / file)
    for step, passed_over, again in on_ranks(replace(case, folder=str(run)), go_on_on_rank):
        assert step == 2
        assert len(passed_over) == 1
        assert str(newest / file) in passed_over[0]
        assert again == curve[2:]
    assert newest.is_dir(), "a damaged checkpoint is not deleted by whoever passes it over"


def refuse_on_rank(checkpoints: str) -> str:
    try:
        newest_valid(LocalPlace(checkpoints), group=coordinator_on_rank(Case(dp=2)).runtime.groups.control)
    except UserError as error:
        return str(error)
    return "nothing was raised"


def test_when_none_verifies_all_ranks_refuse_and_nothing_is_deleted(folder: Path, tmp_path: Path) -> None:
    case, _ = two_saves(folder)
    shutil.copytree(Path(case.folder) / "checkpoints", tmp_path / "checkpoints")
    first, second = (tmp_path / "checkpoints" / f"step-0000000{step}" for step in (4, 2))
    flip(first / "rank-00000.bin")
    truncate(second / "rank-00001.bin")
    before = sorted(tmp_path.rglob("*"))
    for text in pool(2).run(refuse_on_rank, str(tmp_path / "checkpoints")):
        assert "none of its 2 checkpoints verifies" in text
        assert str(first / "rank-00000.bin") in text
        assert str(second / "rank-00001.bin") in text
    assert sorted(tmp_path.rglob("*")) == before


# A save that fails on one rank is given up by all, and the run goes on.


def failing_save_on_rank(case: Case, bad_rank: int, failure: str) -> dict[str, Any]:
    coordinator = coordinator_on_rank(case, with_ledger=True)
    steps_on_rank(coordinator, case, restore_on_rank(coordinator), 1)
    coordinator.save(position_at(1), last=True)
    steps_on_rank(coordinator, case, position_at(1), 1)
    with broken(failure if coordinator.runtime.rank == bad_rank else "nothing"):
        coordinator.save(position_at(2), last=True)
    after_failure = coordinator.saves.saved_at
    curve = steps_on_rank(coordinator, case, position_at(2), 1)
    coordinator.save(position_at(3), last=True)
    return {"failed": after_failure, "then": coordinator.saves.saved_at, "curve": curve}


class broken:
    """While inside, this process's disk fails in one way."""

    def __init__(self, failure: str) -> None:
        self.failure = failure
        self.real = {"write": files.HashingFile.write, "fsync": os.fsync, "mkdir": Path.mkdir, "rename": os.rename}

    def __enter__(self) -> None:
        def fail(code: int) -> Any:
            def failing(*args: Any, **kwargs: Any) -> None:
                raise OSError(code, os.strerror(code))

            return failing

        if self.failure == "full disk":
            files.HashingFile.write = fail(errno.ENOSPC)
        elif self.failure == "bad disk":
            os.fsync = fail(errno.EIO)
        elif self.failure == "read-only folder":
            Path.mkdir = fail(errno.EROFS)
        elif self.failure == "no rename":
            os.rename = fail(errno.EIO)

    def __exit__(self, *args: object) -> None:
        files.HashingFile.write, os.fsync = self.real["write"], self.real["fsync"]
        Path.mkdir, os.rename = self.real["mkdir"], self.real["rename"]


FAILURES = [
    (0, "full disk", "No space left on device"),
    (1, "full disk", "No space left on device"),
    (1, "bad disk", "Input/output error"),
    (0, "bad disk", "Input/output error"),
    (0, "read-only folder", "Read-only file system"),
    (0, "no rename", "Input/output error"),
]


@pytest.mark.parametrize(("bad_rank", "failure", "reason"), FAILURES)
def test_a_failed_save_is_loud_and_the_run_goes_on(tmp_path: Path, bad_rank: int, failure: str, reason: str) -> None:
    case = Case(dp=2, folder=str(tmp_path / "run"), micro_batch=2, keep=3)
    answers = on_ranks(case, failing_save_on_rank, bad_rank, failure)
    assert answers[0] == answers[1]
    assert answers[0]["failed"] == 1
    assert answers[0]["then"] == 3
    place = LocalPlace(tmp_path / "run" / "checkpoints")
    assert place.names() == ["step-00000003", "step-00000001"]
    assert [verify(read_checkpoint(place, name)) for name in place.names()] == [[], []]
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-00000001", "step-00000003"]
    failed = [event for event in ledger_events(tmp_path / "run") if event["event"] == "save_failed"]
    assert [event["step"] for event in failed] == [2]
    assert reason in failed[0]["reason"]


# A rank that dies within a save.


def die_in_save_on_rank(case: Case, victim: int, where: str) -> None:
    coordinator = coordinator_on_rank(case)
    steps_on_rank(coordinator, case, restore_on_rank(coordinator), 2)
    coordinator.save(position_at(2), last=True)
    steps_on_rank(coordinator, case, position_at(2), 1)
    if coordinator.runtime.rank == victim:
        owner, name = {"write": (files.HashingFile, "write"), "rename": (os, "rename")}[where]
        setattr(owner, name, lambda *args: os._exit(9))
    coordinator.save(position_at(3), last=True)


@pytest.mark.parametrize(("victim", "where"), [(0, "write"), (1, "write"), (0, "rename")])
def test_a_rank_that_dies_while_saving_leaves_the_save_before(
    folder: Path, tmp_path: Path, victim: int, where: str
) -> None:
    _, curve = two_saves(folder)
    case = Case(dp=2, folder=str(tmp_path / "run"), micro_batch=2)
    with pytest.raises(WorkerFailure, match=f"rank {victim} of 2 failed ---\nthe process ended with status 9"):
        on_ranks(case, die_in_save_on_rank, victim, where)
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["step-00000002", "step-00000003.partial-1"]
    for step, passed_over, again in on_ranks(case, go_on_on_rank):
        assert (step, passed_over) == (2, [])
        assert again == curve[2:]
