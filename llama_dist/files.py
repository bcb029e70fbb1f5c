"""Files that are hashed while they are written, on disk when they are closed, and checked when they are read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

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


def append_lines(path: Path) -> TextIO:
    """Open a file of lines to add to, flushed line by line; where a kill cut its last line short, that line ends."""
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")
    return open(path, "a", encoding="utf-8", buffering=1)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object a line, but for lines that a kill cut short."""
    objects = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            objects.append(value)
    return objects


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
