"""Where checkpoints are kept, and how each kind of storage makes one appear at once.

A place holds checkpoints by name (step-00000300), each a set of files and one manifest. What is being written is a
draft, which only its attempt knows of; `commit` makes it a checkpoint in one operation of the storage.
"""

from __future__ import annotations

import os
import re
import shutil
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from torch import Tensor

from llama_dist.boxes import Box
from llama_dist.files import HashingFile, check_file, sync_folder, write_file

MANIFEST = "MANIFEST.json"
COMMITTED = re.compile(r"step-(\d{8,})")
LEFTOVER = re.compile(r"step-\d{8,}\.(partial-\d+|pruned)")


class Place(ABC):
    """A folder of checkpoints. Every method that touches the storage may raise OSError."""

    where: str
    """The path or URL, for messages."""

    @abstractmethod
    def names(self) -> list[str]:
        """Committed checkpoints, newest first, whether or not they verify."""

    @abstractmethod
    def draft(self, name: str, attempt: int) -> str:
        """The key of what an attempt writes of a checkpoint, before it is one; touches no storage."""

    @abstractmethod
    def begin(self, draft: str) -> None:
        """Prepare a draft; called by every rank that writes, in any order."""

    @abstractmethod
    def create(self, draft: str, file: str) -> AbstractContextManager[HashingFile]:
        """A new file of a draft: `write`, then `size` and `checksum`; durable when the block ends without an error."""

    @abstractmethod
    def commit(self, draft: str, name: str, manifest: bytes) -> None:
        """Make a draft, whose files are all durable, the checkpoint `name`, also where there was one of that name."""

    @abstractmethod
    def abandon(self, draft: str) -> None:
        """Delete a draft as far as that can be done; never raises."""

    @abstractmethod
    def manifest(self, name: str) -> bytes:
        """The manifest's text."""

    @abstractmethod
    def read_box(self, name: str, file: str, start: int, shape: tuple[int, ...], part: Box, into: Tensor) -> None:
        """Fill `into` (float32 on the CPU, contiguous) with box `part` of an array of `shape` from byte `start`."""

    @abstractmethod
    def check(self, name: str, file: str, *, size: int, checksum: str | None) -> str | None:
        """What is wrong with a file, or None: missing, another size, another xxh3-128 (None: not looked at)."""

    @abstractmethod
    def discard(self, name: str) -> None:
        """Delete a checkpoint, in such an order that it is never half of one."""

    @abstractmethod
    def sweep(self) -> list[str]:
        """Delete what earlier attempts left half-written or half-deleted; returns what could not be deleted, and why."""


class LocalPlace(Place):
    """A folder on a local disk or a shared file system: a checkpoint appears by one rename.

        step-00000300/              committed: it has this name and a manifest that verifies
        step-00000320.partial-7/    being written by the run's 7th attempt, or left over from its end
        step-00000100.pruned        being deleted
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.where = str(folder)

    def names(self) -> list[str]:
        if not self.folder.is_dir():
            return []
        found = [(int(m[1]), p.name) for p in self.folder.iterdir() if (m := COMMITTED.fullmatch(p.name)) and p.is_dir()]
        return [name for _, name in sorted(found, reverse=True)]

    def draft(self, name: str, attempt: int) -> str:
        return f"{name}.partial-{attempt}"

    def begin(self, draft: str) -> None:
        (self.folder / draft).mkdir(parents=True, exist_ok=True)

    def create(self, draft: str, file: str) -> HashingFile:
        return HashingFile(self.folder / draft / file)

    def commit(self, draft: str, name: str, manifest: bytes) -> None:
        write_file(self.folder / draft / MANIFEST, manifest)  # which syncs the folder, and so the ranks' files in it
        if (self.folder / name).exists():  # the run came back to this step because this folder did not verify
            self.discard(name)
        os.rename(self.folder / draft, self.folder / name)
        sync_folder(self.folder)

    def abandon(self, draft: str) -> None:
        shutil.rmtree(self.folder / draft, ignore_errors=True)

    def manifest(self, name: str) -> bytes:
        return (self.folder / name / MANIFEST).read_bytes()

    def read_box(self, name: str, file: str, start: int, shape: tuple[int, ...], part: Box, into: Tensor) -> None:
        path = self.folder / name / file
        target = into.numpy()
        if part.shape[1:] == shape[1:]:  # whole rows follow each other
            row = target.nbytes // part.shape[0]
            _read_exactly(path, start + part.offset[0] * row, memoryview(target).cast("B"))
        else:
            try:
                stored = np.memmap(path, dtype=np.float32, mode="r", offset=start, shape=shape)
            except ValueError as error:
                raise OSError(f"{path}: ends early; it was cut short after it was checked") from error
            target[...] = stored[part.slices]

    def check(self, name: str, file: str, *, size: int, checksum: str | None) -> str | None:
        return check_file(self.folder / name / file, size=size, checksum=checksum)

    def discard(self, name: str) -> None:
        doomed = self.folder / f"{name}.pruned"
        _delete(doomed)
        os.rename(self.folder / name, doomed)
        _delete(doomed)

    def sweep(self) -> list[str]:
        if not self.folder.is_dir():
            return []
        problems = []
        for path in self.folder.iterdir():
            if LEFTOVER.fullmatch(path.name):
                try:
                    _delete(path)
                except OSError as error:
                    problems.append(f"{path}: left over, and cannot be deleted: {error.strerror}")
        return problems


def _read_exactly(path: Path, start: int, view: memoryview) -> None:
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while len(view):
            got = file.readinto(view)
            if not got:
                raise OSError(f"{path}: ends {len(view)} bytes early; it was cut short after it was checked")
            view = view[got:]


def _delete(path: Path) -> None:
    """Delete a folder, or what somebody put in its place; of a link the link only."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
