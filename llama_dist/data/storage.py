"""Where shard files lie: what the reader of shards asks of a place, and the local folder."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from llama_dist.errors import UserError
from llama_dist.files import BLOCK


class File(Protocol):
    """An open file that is read at any place. `path` is for messages; `size` is in bytes."""

    path: str
    size: int

    def read_into(self, buffer: memoryview, at: int) -> None:
        """Fill the buffer from byte `at` on. Raises UserError where the file ends before or cannot be read."""
        ...

    def prefetch(self, at: int, size: int) -> None:
        """Have these bytes ready soon; only a hint, which never raises."""
        ...


class Storage(Protocol):
    """A folder of files. `path` is for messages; `slow`: what will be read is better asked for ahead, all at once."""

    path: str
    slow: bool

    def parent(self) -> tuple[Storage, str]:
        """The folder that this is in, and its name there."""
        ...

    def exists(self, name: str) -> bool: ...

    def read(self, name: str) -> bytes:
        """The whole of a small file."""
        ...

    def open(self, name: str, size: int | None = None, checksum: str | None = None) -> File:
        """Raises UserError where there is no such file, or it is not of the expected `size`.

        The checksum is not looked at; it only tells contents apart. Where both are given, a remote file is not looked
        for before it is read.
        """
        ...

    def whole(self, name: str, size: int) -> Iterator[bytes]:
        """All of a file, past any cache. `size` is the expected one; more or less may come."""
        ...


class LocalFile:
    """A file read with `pread`.

    It closes with its last user: another thread may still read what a cache of open files has let go, and the number
    of a handle that was closed meanwhile could already be that of another file.
    """

    def __init__(self, path: Path, size: int | None = None) -> None:
        self.path = str(path)
        try:
            self._handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise UserError(f"{path}: is missing; copy or make the shards again") from error
        except OSError as error:
            raise UserError(f"{path}: cannot be opened: {error.strerror}") from error
        weakref.finalize(self, os.close, self._handle)
        self.size = os.fstat(self._handle).st_size
        check_size(self.path, self.size, size)

    def read_into(self, buffer: memoryview, at: int) -> None:
        try:
            done = os.preadv(self._handle, [buffer], at)
            while done < len(buffer):
                count = os.preadv(self._handle, [buffer[done:]], at + done)
                if not count:
                    raise UserError(
                        f"{self.path}: ended at byte {at + done} while it was read, expected {at + len(buffer)}; "
                        "was it replaced?"
                    )
                done += count
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error.strerror}") from error

    def prefetch(self, at: int, size: int) -> None:
        try:
            os.posix_fadvise(self._handle, at, size, os.POSIX_FADV_WILLNEED)
        except OSError:  # a file system that takes no hints
            pass


class LocalStorage:
    """A folder of this machine, or of a file system that it has mounted."""

    slow = False

    def __init__(self, folder: Path) -> None:
        self.path = str(folder)
        self._folder = folder

    def parent(self) -> tuple[Storage, str]:
        return LocalStorage(self._folder.parent), self._folder.name

    def exists(self, name: str) -> bool:
        return (self._folder / name).is_file()

    def read(self, name: str) -> bytes:
        file = self.open(name)
        content = bytearray(file.size)
        file.read_into(memoryview(content), 0)
        return bytes(content)

    def open(self, name: str, size: int | None = None, checksum: str | None = None) -> File:
        return LocalFile(self._folder / name, size)

    def whole(self, name: str, size: int) -> Iterator[bytes]:
        path = self._folder / name
        try:
            with open(path, "rb", buffering=0) as file:
                while block := file.read(BLOCK):
                    yield block
        except FileNotFoundError as error:
            raise UserError(f"{path}: is missing; copy or make the shards again") from error
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def check_size(path: str, found: int, expected: int | None) -> None:
    """Raise UserError where a file is not as long as it should be; None: any length will do."""
    if expected is not None and found != expected:
        what = "is cut short" if found < expected else "is too long"
        raise UserError(f"{path}: {what}: {found} bytes, expected {expected}; copy or make the shards again")
