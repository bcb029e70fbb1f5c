"""The directory protocol: killed anywhere, a save leaves a good checkpoint; what is not whole is never loaded."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_dist import files
from llama_dist.boxes import Box, boxes_of_flat_range
from llama_dist.checkpoint import store
from llama_dist.checkpoint.dcp import NotFiniteError
from llama_dist.checkpoint.pieces import Piece
from llama_dist.checkpoint.store import (
    MANIFEST,
    Checkpoint,
    Position,
    SaveError,
    clean_leftovers,
    discard,
    list_committed,
    load_pieces,
    newest_valid,
    prune,
    read_checkpoint,
    save_checkpoint,
    verify,
)
from llama_dist.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process, as asked

SHAPES = {"matrix": (7, 5), "optimizer.exp_avg.matrix": (7, 5), "norm": (5,)}


def tensors_at(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def pieces_of(tensors: dict[str, torch.Tensor]) -> list[Piece]:
    """Each tensor in the pieces of two flat shares, as two ranks would hold them."""
    pieces = []
    for name, tensor in tensors.items():
        middle = tensor.numel() // 2 + 1
        for start, stop in ((0, middle), (middle, tensor.numel())):
            for box in boxes_of_flat_range(tuple(tensor.shape), start, stop):
                pieces.append(Piece(name, tuple(tensor.shape), box, tensor[box.slices].clone()))
    return pieces


def save(folder: Path, step: int, *, attempt: int = 1) -> Path:
    return save_checkpoint(
        folder,
        Position(step, 8 * step),
        pieces_of(tensors_at(step)),
        state={"note": f"step {step}"},
        attempt=attempt,
        group=None,
    )


def load(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    tensors = {name: torch.full(shape, torch.nan) for name, shape in SHAPES.items()}
    pieces = [Piece(name, t.shape, Box((0,) * t.dim(), tuple(t.shape)), t) for name, t in tensors.items()]
    load_pieces(checkpoint, pieces, group=None)
    return tensors


def assert_loads(folder: Path, steps: set[int]) -> int:
    """The newest valid checkpoint is one of `steps` and holds that step's bits; returns which."""
    checkpoint, _ = newest_valid(folder)
    assert checkpoint is not None
    step = checkpoint.position.step
    assert step in steps
    assert checkpoint.position.samples == 8 * step
    assert checkpoint.manifest["note"] == f"step {step}"
    for name, tensor in load(checkpoint).items():
        assert torch.equal(tensor, tensors_at(step)[name]), name
    return step


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    assert path == tmp_path / "step-00000003"
    assert sorted(file.name for file in path.iterdir()) == [MANIFEST, "rank-00000.bin", "tensors.json"]
    assert_loads(tmp_path, {3})
    save(tmp_path, 12)
    assert_loads(tmp_path, {12})
    assert list_committed(tmp_path) == [tmp_path / "step-00000012", path]


def test_no_folder_and_an_empty_one_are_a_fresh_start(tmp_path: Path) -> None:
    assert newest_valid(tmp_path / "none") == (None, [])
    assert newest_valid(tmp_path) == (None, [])


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
    save(folder, 20, attempt=2)
    prune(folder, keep=1)


def resave_over_a_damaged_one(folder: Path) -> None:
    save(folder, 15, attempt=2)


def clean_and_save(folder: Path) -> None:
    clean_leftovers(folder)
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
        checkpoint, passed_over = newest_valid(folder)
        assert passed_over == [], "whatever is committed is whole"
        # The next start cleans up, and its saves work.
        clean_leftovers(folder)
        assert all(store.COMMITTED.fullmatch(path.name) for path in folder.iterdir())
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
    assert sum(point.startswith("os.remove") for point in points) >= 6
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


def test_a_state_that_is_no_number_is_not_saved(tmp_path: Path) -> None:
    save(tmp_path, 10)
    for bad in (torch.nan, torch.inf):
        tensors = tensors_at(20)
        tensors["norm"][3] = bad
        with pytest.raises(NotFiniteError, match="norm holds values that are not finite numbers"):
            save_checkpoint(tmp_path, Position(20), pieces_of(tensors), state={}, attempt=1, group=None)
    assert list(tmp_path.iterdir()) == [tmp_path / "step-00000010"]


def test_pieces_that_do_not_cover_a_tensor_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match=r"norm: pieces cover 3 of 5 elements"):
        save_checkpoint(tmp_path, Position(1), pieces_of(tensors_at(1))[:-1], state={}, attempt=1, group=None)
    assert list(tmp_path.iterdir()) == []


# Damage.


def damaged(path: Path, change: str) -> None:
    if change == "missing":
        path.unlink()
    elif change == "truncated":
        os.truncate(path, path.stat().st_size - 1)
    elif change == "longer":
        path.write_bytes(path.read_bytes() + b"\0")
    elif change == "garbage":
        path.write_bytes(b"[]")
    else:
        data = bytearray(path.read_bytes())
        data[int(change)] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("file", ["rank-00000.bin", "tensors.json", MANIFEST])
@pytest.mark.parametrize("change", ["missing", "truncated", "longer", "garbage", "0", "20", "-3"])
def test_any_damage_is_named_and_passed_over(tmp_path: Path, file: str, change: str) -> None:
    save(tmp_path, 10)
    path = save(tmp_path, 20) / file
    if file == MANIFEST and change == "longer":
        path.write_bytes(path.read_bytes() + b"}")
    else:
        damaged(path, change)
    checkpoint, passed_over = newest_valid(tmp_path)
    assert checkpoint.position.step == 10
    assert len(passed_over) == 1
    assert passed_over[0].startswith(f"{path}: ")
    assert_loads(tmp_path, {10})


def test_every_single_bit_of_the_manifest_counts(tmp_path: Path) -> None:
    path = save(tmp_path, 10) / MANIFEST
    good = path.read_bytes()
    for at in range(len(good)):
        data = bytearray(good)
        data[at] ^= 1 << (at % 8)
        path.write_bytes(data)
        with pytest.raises(ValueError, match=MANIFEST):
            read_checkpoint(path.parent)
    path.write_bytes(good)
    read_checkpoint(path.parent)


def test_damage_says_what_was_expected_and_found(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(save(tmp_path, 10))
    record = checkpoint.manifest["files"]["rank-00000.bin"]
    assert verify(checkpoint) == []
    file = checkpoint.path / "rank-00000.bin"
    damaged(file, "truncated")
    assert verify(checkpoint) == [f"{file}: has {record['bytes'] - 1} bytes, expected {record['bytes']}"]
    damaged(file, "longer")  # as long as before, and another byte
    damaged(file, "-1")
    (problem,) = verify(checkpoint)
    assert f"expected {record['xxh3_128']}" in problem


def test_verification_is_shared_out_among_ranks(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(save(tmp_path, 10))
    for file in ("rank-00000.bin", "tensors.json"):
        damaged(checkpoint.path / file, "missing")
    parts = [verify(checkpoint, part=part, parts=3) for part in range(3)]
    assert sorted(map(len, parts)) == [0, 1, 1]
    assert sorted(sum(parts, [])) == sorted(verify(checkpoint))


def test_when_none_verifies_it_is_never_a_fresh_start(tmp_path: Path) -> None:
    for step in (10, 20):
        damaged(save(tmp_path, step) / "rank-00000.bin", "0")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="none of its 2 checkpoints verifies") as error:
        newest_valid(tmp_path)
    assert all(f"step-000000{step}" in str(error.value) for step in (10, 20))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_newer_format_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    body = json.loads((path / MANIFEST).read_text())
    body["format"] = 99
    del body["checksum"]
    body["checksum"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (path / MANIFEST).write_text(json.dumps(body))
    with pytest.raises(ValueError, match=r"MANIFEST.json: format 99; this version of llama_dist reads 1"):
        read_checkpoint(path)


# Retention.


def test_the_newest_stay(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path, step)
    assert [path.name for path in prune(tmp_path, keep=2)] == ["step-00000020", "step-00000010"]
    assert prune(tmp_path, keep=2) == []
    assert [path.name for path in list_committed(tmp_path)] == ["step-00000040", "step-00000030"]
    assert_loads(tmp_path, {40})
    prune(tmp_path, keep=0)
    assert_loads(tmp_path, {40})


def test_retention_never_deletes_the_last_good_one_for_the_sake_of_damaged_ones(tmp_path: Path) -> None:
    bad = [tmp_path / "step-00000030", tmp_path / "step-00000020"]
    for step in (10, 20, 30):
        save(tmp_path, step)
    for path in bad:
        damaged(path / "rank-00000.bin", "0")
    # The run went on from step 10 and saves at step 15.
    save(tmp_path, 15)
    assert [path.name for path in prune(tmp_path, keep=1, damaged=bad)] == ["step-00000010"]
    assert_loads(tmp_path, {15})
    assert prune(tmp_path, keep=1, damaged=bad) == []
    save(tmp_path, 25)
    assert [path.name for path in prune(tmp_path, keep=2, damaged=bad)] == ["step-00000020"]
    assert_loads(tmp_path, {25})
    assert [path.name for path in list_committed(tmp_path)] == ["step-00000030", "step-00000025", "step-00000015"]


def test_discarding_takes_the_name_away_before_the_first_file(tmp_path: Path, failing: Any) -> None:
    path = save(tmp_path, 10)
    failing(shutil, "rmtree", errno.EIO, at=1)
    with pytest.raises(OSError):
        discard(path)
    assert list_committed(tmp_path) == []
    assert [left.name for left in tmp_path.iterdir()] == ["step-00000010.pruned"]


def test_a_leftover_that_stays_is_told_and_stops_nothing(tmp_path: Path, failing: Any) -> None:
    (tmp_path / "step-00000005.pruned").mkdir()
    failing(shutil, "rmtree", errno.EBUSY, at=1)
    assert clean_leftovers(tmp_path) == [
        f"{tmp_path / 'step-00000005.pruned'}: left over, and cannot be deleted: {os.strerror(errno.EBUSY)}"
    ]


def test_a_checkpoint_under_another_name_is_damage(tmp_path: Path) -> None:
    """A copy under a later name would otherwise stand for a step that was never reached, and outlive the real one."""
    save(tmp_path, 10)
    shutil.copytree(tmp_path / "step-00000010", tmp_path / "step-00000099")
    checkpoint, passed_over = newest_valid(tmp_path)
    assert checkpoint is not None and checkpoint.position.step == 10
    assert passed_over == [f"{tmp_path / 'step-00000099'}: holds the checkpoint step-00000010; somebody renamed or copied it"]


def test_a_manifest_nested_without_end_is_damage(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    (tmp_path / "step-00000020" / "MANIFEST.json").write_text("[" * 200_000)
    checkpoint, passed_over = newest_valid(tmp_path)
    assert checkpoint is not None and checkpoint.position.step == 10 and len(passed_over) == 1


def test_leftovers_are_deleted_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path, 10)
    for name in ("step-00000020.partial-3", "step-00000005.pruned", "notes", "step-1.partial-2", "step-00000030.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    elsewhere = tmp_path.parent / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "step-00000006.pruned").symlink_to(elsewhere)
    (tmp_path / "step-00000007.pruned").write_text("a file, not a folder")
    assert clean_leftovers(tmp_path) == []
    assert elsewhere.is_dir()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "step-00000010", "step-00000030.old", "step-1.partial-2"]
    assert_loads(tmp_path, {10})
    assert clean_leftovers(tmp_path / "none") == []


# Nothing runs code.


def test_no_file_is_a_pickle_and_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, 10)
    for file in path.iterdir():
        if file.suffix == ".json":
            json.loads(file.read_text())
        else:
            raw = b"".join(piece.data.numpy().tobytes() for piece in pieces_of(tensors_at(10)))
            assert file.read_bytes() == raw, "raw float32 and nothing else"

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was unpickled")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (pickle, "_Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, refuse)
    assert_loads(tmp_path, {10})


def test_another_models_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(save(tmp_path, 10))
    for name, shape, told in (("head", (2, 2), "no tensor 'head'"), ("norm", (6,), "shape (5,), the model (6,)")):
        piece = Piece(name, shape, Box((0,) * len(shape), shape), torch.zeros(shape))
        with pytest.raises(UserError) as error:
            load_pieces(checkpoint, [piece], group=None)
        assert told in str(error.value)
        assert str(checkpoint.path) in str(error.value)
