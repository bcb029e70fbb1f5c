"""Committed checkpoints: read, verified, the newest good one found, loaded.

    step-00000300/
        MANIFEST.json       written last: position, layout, versions, every file's size and checksum
        rank-00000.bin ...  raw float32, little-endian; which element lies where follows from the layout (`plan.py`)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch.distributed as dist

from llama_dist.checkpoint.dcp import read_pieces
from llama_dist.checkpoint.object_place import ObjectPlace
from llama_dist.checkpoint.pieces import Piece
from llama_dist.checkpoint.places import MANIFEST, LocalPlace, Place
from llama_dist.checkpoint.plan import SavedLayout
from llama_dist.config import ModelConfig, build_config
from llama_dist.data.remote import is_url
from llama_dist.errors import UserError
from llama_dist.runtime import gather_texts

FORMAT = 2


@dataclass(frozen=True)
class Position:
    """Where a run stands: optimizer updates made, and samples consumed."""

    step: int = 0
    samples: int = 0

    def next(self, global_batch: int) -> Position:
        return Position(self.step + 1, self.samples + global_batch)


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint whose manifest has been read."""

    place: Place
    name: str
    position: Position
    manifest: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.place.where}/{self.name}"

    @cached_property
    def saved(self) -> SavedLayout:
        """How its tensors are spread over its files."""
        model = build_config(ModelConfig, self.manifest["config"]["model"], where=f"{self}/{MANIFEST}")
        return SavedLayout.from_json(model, self.manifest["layout"])


def open_place(where: str | Path) -> Place:
    """The place at a path or URL. Raises UserError for a URL where no checkpoints can be kept."""
    if is_url(where) and not str(where).startswith("file://"):
        return ObjectPlace(str(where))
    return LocalPlace(str(where).removeprefix("file://"))


def load_pieces(checkpoint: Checkpoint, pieces: Sequence[Piece]) -> int:
    """Fill the pieces' data from a checkpoint that any layout wrote; returns the bytes this rank read.

    Raises UserError where the checkpoint is of another model, or cannot be read.
    """

    def read(file: str, *args: Any) -> None:
        checkpoint.place.read_box(checkpoint.name, file, *args)

    try:
        return read_pieces(pieces, checkpoint.saved, read)
    except (ValueError, OSError) as error:
        raise UserError(f"{checkpoint}: does not fit this run: {error}") from error


def folder_name(position: Position) -> str:
    """What a checkpoint's folder is called."""
    return f"step-{position.step:08d}"


def seal(body: dict[str, Any]) -> bytes:
    """The manifest's text, with a checksum of itself."""
    return json.dumps({"format": FORMAT, **body, "checksum": _checksum({"format": FORMAT, **body})}, indent=1).encode()


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_checkpoint(place: Place, name: str) -> Checkpoint:
    """Read and check the manifest of a committed checkpoint. Raises ValueError saying what is wrong with it."""
    where = f"{place.where}/{name}"
    path = f"{where}/{MANIFEST}"
    try:
        body = json.loads(place.manifest(name))
        checksum, version = body.pop("checksum", None), body["format"]
        found = _checksum(body)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if version != FORMAT:  # before its checksum, which another version may make in another way
        versions = body.get("versions")
        by = versions.get("llama_dist") if isinstance(versions, dict) else None
        by = by or "another version"
        raise ValueError(f"{path}: format {version}, written by llama_dist {by}; this version reads format {FORMAT}")
    if found != checksum:
        raise ValueError(f"{path}: its sha256 is {found}, expected {checksum}")
    if missing := {"step", "samples", "files"} - body.keys():
        raise ValueError(f"{path}: says nothing of {', '.join(sorted(missing))}")
    position = Position(body["step"], body["samples"])
    if name != folder_name(position):
        raise ValueError(f"{where}: holds the checkpoint {folder_name(position)}; somebody renamed or copied it")
    return Checkpoint(place, name, position, body | {"seal": checksum})


def verify(checkpoint: Checkpoint, *, part: int = 0, parts: int = 1, full: bool = True) -> list[str]:
    """Check every file's size and, if `full`, checksum; returns what is wrong. `parts` callers can share the work."""
    files = sorted(checkpoint.manifest["files"])[part::parts]
    return list(verify_files(checkpoint, files, full=full).values())


def verify_files(checkpoint: Checkpoint, files: Iterable[str], *, full: bool = True) -> dict[str, str]:
    """What is wrong with each of these files; those that are good are left out."""
    wrong: dict[str, str] = {}
    for name in files:
        record = checkpoint.manifest["files"][name]
        checksum = record["xxh3_128"] if full else None
        problem = checkpoint.place.check(checkpoint.name, name, size=record["bytes"], checksum=checksum)
        if problem:
            wrong[name] = problem
    return wrong


def needed_ranks(checkpoint: Checkpoint, pieces: Iterable[Piece]) -> set[int]:
    """The ranks in whose files these pieces lie."""
    return {stored.rank for piece in pieces for stored in checkpoint.saved.stored(piece.name, piece.box)}


def newest_valid(
    place: Place, *, group: dist.ProcessGroup | None = None, full: bool = True
) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies whole, and what was wrong with those passed over.

    Collective over `group`, whose ranks share the reading. Raises UserError when there are checkpoints and none
    verifies: that is never a fresh start.
    """
    part, parts = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
    candidates = _same_everywhere(place.names(), group)
    passed_over: list[str] = []
    for name in candidates:
        try:
            checkpoint = read_checkpoint(place, name)
            problems = verify(checkpoint, part=part, parts=parts, full=full)
        except ValueError as error:
            problems = [str(error)]
        problems = gather_texts(problems, group=group)
        if not problems:
            return checkpoint, passed_over
        passed_over += problems
    if passed_over:
        raise UserError(
            f"{place.where}: none of its {len(candidates)} checkpoints verifies, and a run with checkpoints is never "
            f"begun anew; move the folder away to start over. Wrong: " + "; ".join(passed_over)
        )
    return None, []


def _same_everywhere(names: list[str], group: dist.ProcessGroup | None) -> list[str]:
    """The coordinator's list, on every rank: a rank's own view of a shared folder may be stale."""
    box = [names]
    if group is not None:
        dist.broadcast_object_list(box, src=0, group=group)
    return box[0]
