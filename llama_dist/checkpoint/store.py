"""The directory protocol of checkpoints: partial, committed, verified, newest valid, pruned.

    checkpoints/step-00000300/              committed: it has this name and a manifest that verifies
        MANIFEST.json                       written last: position, layout, versions, every file's size and checksum
        tensors.json                        which box of which logical tensor lies where
        rank-00000.bin ...                  raw float32, little-endian
    checkpoints/step-00000320.partial-7/    being written by the run's 7th attempt, or left over from its end
    checkpoints/step-00000100.pruned        being deleted

A folder is committed by one rename after all of its files are on disk. Nothing else makes a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from llama_dist.checkpoint.dcp import NotFiniteError, PieceLoadPlanner, PieceSavePlanner, RawReader, RawWriter
from llama_dist.checkpoint.pieces import Piece
from llama_dist.errors import UserError
from llama_dist.files import check_file, sync_folder, write_file
from llama_dist.runtime import gather_texts

FORMAT = 1
MANIFEST = "MANIFEST.json"
COMMITTED = re.compile(r"step-(\d{8,})")
LEFTOVER = re.compile(r"step-\d{8,}\.(partial-\d+|pruned)")


@dataclass(frozen=True)
class Position:
    """Where a run stands: optimizer updates made, and samples consumed."""

    step: int = 0
    samples: int = 0

    def next(self, global_batch: int) -> Position:
        return Position(self.step + 1, self.samples + global_batch)


@dataclass(frozen=True)
class Checkpoint:
    """A committed folder whose manifest has been read."""

    path: Path
    position: Position
    manifest: dict[str, Any]


class SaveError(RuntimeError):
    """A save failed and was given up; the checkpoints before it are untouched."""


def save_checkpoint(
    folder: Path,
    position: Position,
    pieces: Sequence[Piece],
    *,
    state: dict[str, Any],
    attempt: int,
    group: dist.ProcessGroup | None,
) -> Path:
    """Write and commit a checkpoint; collective over `group`, which holds all ranks (None: one process).

    `state` goes into the manifest. Raises SaveError on every rank, with the reason, when any rank could not write, and
    NotFiniteError when the state has diverged.
    """
    final = folder / folder_name(position)
    partial = folder / f"{final.name}.partial-{attempt}"
    rank = dist.get_rank(group) if group is not None else 0

    def commit(files: dict[str, Any]) -> None:
        body = {"format": FORMAT, "step": position.step, "samples": position.samples, **state, "files": files}
        write_file(partial / MANIFEST, _seal(body))
        if final.exists():  # the run came back to this step because this folder did not verify
            discard(final)
        os.rename(partial, final)
        sync_folder(folder)

    writer = RawWriter(partial, rank=rank, commit=commit)
    try:
        planner = PieceSavePlanner(pieces)
        dcp.save({}, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
    except (CheckpointException, OSError) as error:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, CheckpointException):
            if any(isinstance(failure[0], NotFiniteError) for failure in error.failures.values()):
                raise NotFiniteError(f"{final}: not saved: {_reasons(error)}") from error
        raise SaveError(f"{final}: not saved: {_reasons(error)}") from error
    return final


def load_pieces(checkpoint: Checkpoint, pieces: Sequence[Piece], *, group: dist.ProcessGroup | None) -> int:
    """Fill the pieces' data from a checkpoint that any layout wrote; returns the bytes this rank read.

    Raises UserError where the checkpoint is of another model.
    """
    reader = RawReader(checkpoint.path)
    try:
        planner = PieceLoadPlanner(pieces)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process, as asked
            dcp.load({}, storage_reader=reader, planner=planner, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        raise UserError(f"{checkpoint.path}: does not fit this run: {_reasons(error)}") from error
    return reader.bytes_read


def _reasons(error: BaseException) -> str:
    if not isinstance(error, CheckpointException):
        return str(error)
    return "; ".join(sorted({str(failure[0]) for failure in error.failures.values()}))


def _seal(body: dict[str, Any]) -> bytes:
    """The manifest's text, with a checksum of itself."""
    return json.dumps({**body, "checksum": _checksum(body)}, indent=1).encode()


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and check the manifest of a committed folder. Raises ValueError saying what is wrong with it."""
    try:
        body = json.loads((path / MANIFEST).read_text())
        checksum = body.pop("checksum")
        found = _checksum(body)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path / MANIFEST}: cannot be read: {error}") from error
    if found != checksum:
        raise ValueError(f"{path / MANIFEST}: its sha256 is {found}, expected {checksum}")
    if body["format"] != FORMAT:
        raise ValueError(f"{path / MANIFEST}: format {body['format']}; this version of llama_dist reads {FORMAT}")
    position = Position(body["step"], body["samples"])
    if path.name != folder_name(position):
        raise ValueError(f"{path}: holds the checkpoint {folder_name(position)}; somebody renamed or copied it")
    return Checkpoint(path, position, body)


def folder_name(position: Position) -> str:
    """What a checkpoint's folder is called."""
    return f"step-{position.step:08d}"


def verify(checkpoint: Checkpoint, *, part: int = 0, parts: int = 1) -> list[str]:
    """Check every file's size and checksum; returns what is wrong. `parts` callers can share the work."""
    files = sorted(checkpoint.manifest["files"].items())
    problems = []
    for name, record in files[part::parts]:
        problems.append(check_file(checkpoint.path / name, size=record["bytes"], checksum=record["xxh3_128"]))
    return [problem for problem in problems if problem]


def list_committed(folder: Path) -> list[Path]:
    """Committed folders, newest first, whether or not they verify."""
    if not folder.is_dir():
        return []
    found = [(int(m[1]), path) for path in folder.iterdir() if (m := COMMITTED.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(found, reverse=True)]


def newest_valid(folder: Path, *, group: dist.ProcessGroup | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies whole, and what was wrong with those passed over.

    Collective over `group`, whose ranks share the reading. Raises UserError when there are checkpoints and none
    verifies: that is never a fresh start.
    """
    part, parts = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
    candidates = _same_everywhere(list_committed(folder), group)
    passed_over: list[str] = []
    for path in candidates:
        try:
            checkpoint = read_checkpoint(path)
            problems = verify(checkpoint, part=part, parts=parts)
        except ValueError as error:
            problems = [str(error)]
        problems = gather_texts(problems, group=group)
        if not problems:
            return checkpoint, passed_over
        passed_over += problems
    if passed_over:
        raise UserError(
            f"{folder}: none of its {len(candidates)} checkpoints verifies, and a run with checkpoints is never begun "
            f"anew; move the folder away to start over. Wrong: " + "; ".join(passed_over)
        )
    return None, []


def _same_everywhere(paths: list[Path], group: dist.ProcessGroup | None) -> list[Path]:
    """The coordinator's list, on every rank: a rank's own view of a shared folder may be stale."""
    box = [paths]
    if group is not None:
        dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def prune(folder: Path, *, keep: int, damaged: Sequence[Path] = ()) -> list[Path]:
    """Delete all but the newest `keep` committed folders; returns those deleted.

    `damaged` ones are known not to verify: they do not count, and go when a newer one is there.
    """
    committed = list_committed(folder)
    good = [path for path in committed if path not in damaged]
    kept = good[: max(keep, 1)]
    older = committed[committed.index(kept[0]) :] if kept else []
    doomed = [path for path in older if path not in kept]
    for path in doomed:
        discard(path)
    return doomed


def discard(path: Path) -> None:
    """Delete a committed folder in such an order that it is never half a checkpoint."""
    doomed = path.with_name(path.name + ".pruned")
    _delete(doomed)
    os.rename(path, doomed)
    _delete(doomed)


def clean_leftovers(folder: Path) -> list[str]:
    """Delete what an earlier attempt left half-written or half-deleted; returns what could not be deleted, and why."""
    if not folder.is_dir():
        return []
    problems = []
    for path in folder.iterdir():
        if LEFTOVER.fullmatch(path.name):
            try:
                _delete(path)
            except OSError as error:
                problems.append(f"{path}: left over, and cannot be deleted: {error.strerror}")
    return problems


def _delete(path: Path) -> None:
    """Delete a folder, or what somebody put in its place; of a link the link only."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
