"""Files that are hashed while they are written, on disk when they are closed, and checked when they are read."""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import xxhash

BLOCK = 4 << 20  # bytes read at a time while checking
SECTOR = 4096  # bytes, of which direct writes take multiples
DIRECT_FROM = 1 << 20  # bytes: smaller direct writes are slower than others


class HashingFile:
    """A new file: `write` as often as you like, then `size` in bytes and `checksum` (xxh3-128, hex).

    Leaving the `with` block without an error flushes the file to the disk. Large writes from `aligned_memory` go past
    the page cache where the file system can do that: as fast, at a quarter of the processor's time, and they push
    nothing else out of the memory. Errors of the disk and of its quota are OSError.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "xb", buffering=0)
        self._hash = xxhash.xxh3_128()
        self._can_be_direct = hasattr(os, "O_DIRECT")
        self._is_direct = False
        self.size = 0

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        self._hash.update(view)
        while len(view):  # a raw write may take less than it is given
            written = self._write_some(view)
            view = view[written:]
            self.size += written

    def _write_some(self, view: memoryview) -> int:
        whole = len(view) // SECTOR * SECTOR
        if self._can_be_direct and whole >= DIRECT_FROM and self.size % SECTOR == 0:
            try:
                self._set_direct(True)
                return self._file.write(view[:whole])
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._can_be_direct = False  # not on this file system, or not from this memory
        self._set_direct(False)
        return self._file.write(view)

    def _set_direct(self, on: bool) -> None:
        if on != self._is_direct:
            flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
            fcntl.fcntl(self._file, fcntl.F_SETFL, flags ^ os.O_DIRECT)
            self._is_direct = on

    @property
    def checksum(self) -> str:
        return self._hash.hexdigest()

    def __enter__(self) -> HashingFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._file:
            if kind is None:
                os.fsync(self._file.fileno())


def aligned_memory(size: int) -> mmap.mmap:
    """`size` bytes of zeros, aligned as writes past the page cache want their memory."""
    # Huge pages were tried: looking for them made the first touch five times slower.
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


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


def check_file(path: Path, *, size: int, checksum: str | None) -> str | None:
    """What is wrong with a file, or None: missing, another size, another xxh3-128 (None: not looked at)."""
    try:
        found = path.stat().st_size
        if found != size:
            return f"{path}: has {found} bytes, expected {size}"
        if checksum is None:
            return None
        digest = xxhash.xxh3_128()
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    if digest.hexdigest() != checksum:
        return f"{path}: xxh3-128 is {digest.hexdigest()}, expected {checksum}"
    return None
