"""A save that is killed at any operation on files, or whose disk fails at any, leaves a good checkpoint."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_helpers import assert_loads, names_in, save

from llama_dist import files
from llama_dist.checkpoint.places import COMMITTED, LocalPlace
from llama_dist.checkpoint.saving import SaveError
from llama_dist.checkpoint.store import newest_valid
from llama_dist.config import CheckpointConfig
from llama_dist.train.saves import Pruning


# Kills: a child process of one thread saves and prunes, and dies at its k-th operation on files.


class Killer:
    """Counts this process's operations on files from `arm` on, and ends the process before the k-th."""

    WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink", "shutil.rmtree")

    def __init__(self, k: int) -> None:
        self.k, self.seen, self.armed = k, [], False

    def arm(self) -> None:
        sys.addaudithook(self._audit)
        real_fsync, real_write = os.fsync, files.HashingFile.write

        def fsync(handle: int) -> None:
            self.point("fsync")
            real_fsync(handle)

        def write(file: files.HashingFile, data: Any) -> None:
            self.point("write")
            view = memoryview(data).cast("B")
            if len(self.seen) == self.k - 1:  # the next point: half of the data arrives
                file._file.write(view[: len(view) // 2])
            self.point("half a write")
            real_write(file, data)

        os.fsync, files.HashingFile.write = fsync, write
        self.armed = True

    def point(self, what: str) -> None:
        self.seen.append(what)
        if len(self.seen) == self.k:
            os._exit(9)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if event in self.CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & self.WRITING):
            self.point(f"{event} {os.path.basename(str(args[0]))}")


def save_and_prune(folder: Path) -> None:
    path = save(folder, 20, attempt=2)
    Pruning(LocalPlace(folder), CheckpointConfig(keep=1), folder)(path.name)


def resave_over_a_damaged_one(folder: Path) -> None:
    save(folder, 15, attempt=2)


def clean_and_save(folder: Path) -> None:
    LocalPlace(folder).sweep()
    save(folder, 20, attempt=2)


def kill_everywhere(work: str, base: Path, scratch: Path, pipe: Any) -> None:
    """Run the work once for every k, each in a fork that dies at its k-th point; send (k, what it died at, folder)."""
    for k in range(1, 1000):
        folder = scratch / f"k{k}"
        shutil.copytree(base, folder)
        told, tell = os.pipe()
        child = os.fork()
        if child == 0:
            killer = Killer(k)
            killer.point = _telling(killer.point, tell)
            killer.arm()
            globals()[work](folder)
            os._exit(0)
        os.close(tell)
        with os.fdopen(told) as lines:
            points = lines.read().splitlines()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        pipe.send((k, status, points, folder))
        if status != 9:
            return


def _telling(point: Any, tell: int) -> Any:
    def telling(what: str) -> None:
        os.write(tell, (what.replace("\n", " ") + "\n").encode())
        point(what)

    return telling


def killed_states(work: str, base: Path, scratch: Path) -> Iterator[tuple[list[str], Path]]:
    """(operations begun, folder) for each kill, then (all operations, folder) of the run that was let through."""
    scratch.mkdir()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    # A fresh process, since forking this one, with all that pytest and torch have started in it, is not safe.
    process = context.Process(target=kill_everywhere, args=(work, base, scratch, theirs))
    process.start()
    theirs.close()
    try:
        status = 9
        while status != 0:
            k, status, points, folder = ours.recv()
            assert status in (0, 9), f"the child failed at point {k}: {points[-1:]}"
            assert status == 0 or len(points) == k
            yield points, folder
    finally:
        process.kill()
        process.join()


def test_a_kill_at_any_file_operation_of_save_and_prune_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save(base, 10)
    found: list[int] = []
    for points, folder in killed_states("save_and_prune", base, tmp_path / "killed"):
        found.append(assert_loads(folder, {10, 20}))
        checkpoint, passed_over = newest_valid(LocalPlace(folder))
        assert passed_over == [], "whatever is committed is whole"
        # The next start cleans up, and its saves work.
        assert LocalPlace(folder).sweep() == []
        assert all(COMMITTED.fullmatch(name) for name in names_in(folder))
        save(folder, checkpoint.position.step + 10, attempt=3)
        assert_loads(folder, {checkpoint.position.step + 10})
    kinds = [point.split(" ")[0] for point in points]
    assert len(found) - 1 == len(points) >= 20, points
    assert {"os.mkdir", "open", "write", "half", "fsync", "os.rename", "os.remove", "os.rmdir"} <= set(kinds), points
    assert found == sorted(found) and found[0] == 10 and found[-1] == 20
    # One rename decides: everything before it leaves the old one, everything after it the new one.
    commit = next(i for i, point in enumerate(points) if point == "os.rename step-00000020.partial-2")
    assert found.count(10) == commit + 1


def test_a_kill_while_a_damaged_checkpoint_is_replaced_leaves_the_one_before(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save(base, 10)
    damaged = save(base, 15) / "rank-00000.bin"
    damaged.write_bytes(damaged.read_bytes()[:-4])
    found = []
    for points, folder in killed_states("resave_over_a_damaged_one", base, tmp_path / "killed"):
        found.append(assert_loads(folder, {10, 15}))
    assert len(points) >= 15
    assert found == sorted(found) and {10, 15} == set(found)


def test_a_kill_while_leftovers_are_cleaned_harms_nothing(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save(base, 10)
    shutil.copytree(base / "step-00000010", base / "step-00000020.partial-1")
    shutil.copytree(base / "step-00000010", base / "step-00000005.pruned")
    found = []
    for points, folder in killed_states("clean_and_save", base, tmp_path / "killed"):
        found.append(assert_loads(folder, {10, 20}))
    assert sum(point.startswith("os.remove") for point in points) >= 4
    assert found[0] == 10 and found[-1] == 20


# Disks that fail.


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the n-th call (from 1) of a function fail with an OSError, and all later ones."""

    def fail(owner: Any, name: str, code: int, *, at: int = 1) -> None:
        real, calls = getattr(owner, name), [0]

        def failing(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] >= at:
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, failing)

    return fail


@pytest.mark.parametrize(
    ("owner", "name", "code"),
    [
        (files.HashingFile, "write", errno.ENOSPC),
        (os, "fsync", errno.EIO),
        (Path, "mkdir", errno.EROFS),
        (os, "rename", errno.EIO),
        (os, "replace", errno.EACCES),
    ],
)
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_disk_that_fails_is_a_save_error_and_the_old_one_stays(
    tmp_path: Path, failing: Any, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, code: int, at: int
) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, 10)
    calls = {"mkdir": 1, "rename": 1, "replace": 1}.get(name, 3)
    failing(owner, name, code, at=min(at, calls))
    with pytest.raises(SaveError) as error:
        save(folder, 20)
    monkeypatch.undo()
    assert os.strerror(code) in str(error.value)
    assert str(folder / "step-00000020") in str(error.value)
    assert list(folder.iterdir()) == [folder / "step-00000010"], "nothing half-written stays"
    assert_loads(folder, {10})
    save(folder, 20)
    assert_loads(folder, {20})


def test_a_disk_that_fails_after_the_rename_leaves_both_whole(tmp_path: Path, failing: Any) -> None:
    """Whether the rename is durable nobody knows, so the save counts as failed, and what is there is good."""
    save(tmp_path, 10)
    failing(os, "fsync", errno.EIO, at=4)
    with pytest.raises(SaveError, match="not saved"):
        save(tmp_path, 20)
    assert names_in(tmp_path) == ["step-00000010", "step-00000020"]
    assert_loads(tmp_path, {20})


def test_a_folder_that_cannot_be_written_to_is_a_save_error(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints", 10)
    (tmp_path / "checkpoints").rename(tmp_path / "away")
    (tmp_path / "checkpoints").write_text("a file where the folder was")
    with pytest.raises(SaveError, match=rf"{tmp_path}/checkpoints/step-00000020: not saved: "):
        save(tmp_path / "checkpoints", 20)
    assert_loads(tmp_path / "away", {10})


def test_what_a_failed_save_leaves_behind_does_not_hinder_the_next_start(
    tmp_path: Path, failing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk takes no more, and deletes nothing."""
    save(tmp_path, 10)
    failing(files.HashingFile, "write", errno.EIO, at=2)
    failing(os, "unlink", errno.EIO)
    with pytest.raises(SaveError, match=os.strerror(errno.EIO)):
        save(tmp_path, 20, attempt=1)
    monkeypatch.undo()
    assert names_in(tmp_path) == ["step-00000010", "step-00000020.partial-1"]
    assert_loads(tmp_path, {10})
    save(tmp_path, 20, attempt=2)
    assert_loads(tmp_path, {20})
    assert LocalPlace(tmp_path).sweep() == []
    assert names_in(tmp_path) == ["step-00000010", "step-00000020"]


def test_a_leftover_that_stays_is_told_and_stops_nothing(tmp_path: Path, failing: Any) -> None:
    (tmp_path / "step-00000005.pruned").mkdir()
    failing(shutil, "rmtree", errno.EBUSY)
    assert LocalPlace(tmp_path).sweep() == [
        f"{tmp_path / 'step-00000005.pruned'}: left over, and cannot be deleted: {os.strerror(errno.EBUSY)}"
    ]


def test_discarding_takes_the_name_away_before_the_first_file(tmp_path: Path, failing: Any) -> None:
    path = save(tmp_path, 10)
    failing(shutil, "rmtree", errno.EIO)
    with pytest.raises(OSError):
        LocalPlace(tmp_path).discard(path.name)
    assert LocalPlace(tmp_path).names() == []
    assert names_in(tmp_path) == ["step-00000010.pruned"]
