"""Files that are hashed while they are written, on disk when they are closed, and checked when they are read."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

BLOCK = 4 << 20  # bytes read at a time while checking


class HashingFile:
    """A new file: `write` as often as you like, then `size` in bytes and `checksum` (xxh3-128, hex).

    Leaving the `with` block without an error flushes the file to the disk.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "xb", buffering=0)
        self._hash = xxhash.xxh3_128()
        self.size = 0

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        self._hash.update(view)
        self.size += len(view)
        while len(view):  # a raw write may take less than it is given
            view = view[self._file.write(view) :]

    @property
    def checksum(self) -> str:
        return self._hash.hexdigest()

    def __enter__(self) -> HashingFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._file:
            if kind is None:
                os.fsync(self._file.fileno())


def write_file(path: Path, data: bytes) -> None:
    """Write a whole file so that a reader sees the old content or the new, and never a part."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    with HashingFile(temporary) as file:
        file.write(data)
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename in it survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_file(path: Path, *, size: int, checksum: str) -> str | None:
    """What is wrong with a file, or None: missing, another size, another xxh3-128."""
    try:
        found = path.stat().st_size
        if found != size:
            return f"{path}: has {found} bytes, expected {size}"
        digest = xxhash.xxh3_128()
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    if digest.hexdigest() != checksum:
        return f"{path}: xxh3-128 is {digest.hexdigest()}, expected {checksum}"
    return None
