"""Blocks of remote files on a disk of this machine: of bounded size, shared by all processes, and checksummed."""

from __future__ import annotations

import fcntl
import os
import tempfile
import threading
import warnings
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import xxhash

from llama_dist.errors import UserError

LOCKS = 1024
CHECKSUM_BYTES = 8
EVICTIONS = 20  # tries to make room; a block that is used between two looks stays


class BlockCache:
    """A folder with at most `limit` bytes of blocks, those used last; block `number` of the file known as `key`.

    A block is a file of its own that appears whole, and ends with a hash of its content and its name: one that was
    torn, damaged or mixed up is as good as absent. Nothing but the speed depends on what is in the folder, so
    processes need not agree on anything, and it may be deleted at any time.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._blocks, self._locks, self.limit = folder / "blocks", folder / "locks", limit
        self._writing = threading.Lock()
        self._written = limit  # the first write looks at what others have left
        try:
            for made in (self._blocks, self._locks):
                made.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be made ({error.strerror}), and is to hold blocks of remote files; "
                "set data.cache to a folder that can be written"
            ) from error

    def get(self, key: str, number: int) -> bytes | None:
        """The block, or None where it is not there whole."""
        path = self._path(key, number)
        try:
            with open(path, "rb", buffering=0) as file:
                content = file.readall()
                os.utime(file.fileno())  # what was used last is evicted last
        except OSError:
            return None
        block = content[:-CHECKSUM_BYTES]
        if content[-CHECKSUM_BYTES:] != _checksum(key, number, block):
            path.unlink(missing_ok=True)
            return None
        return block

    def has(self, key: str, number: int) -> bool:
        """Whether a block seems to be there."""
        return self._path(key, number).exists()

    def put(self, key: str, number: int, block: bytes) -> None:
        """Keep a block. A disk that is full is warned of and is no error: the block is at hand all the same."""
        path = self._path(key, number)
        content = block + _checksum(key, number, block)
        try:
            with self._writing:
                self._make_room(len(content))
                path.parent.mkdir(parents=True, exist_ok=True)
                handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
                try:
                    with open(handle, "wb") as file:
                        file.write(content)
                    os.replace(temporary, path)
                except BaseException:
                    Path(temporary).unlink(missing_ok=True)
                    raise
        except OSError as error:
            warnings.warn(
                f"{path.parent}: remote blocks cannot be kept there ({error.strerror}), and are fetched each time; "
                "set data.cache to another folder, or lower data.cache_gb",
                stacklevel=2,
            )

    @contextmanager
    def alone(self, key: str, number: int) -> Iterator[None]:
        """Keeps others, in this process and in others, from fetching the same block meanwhile.

        Some other blocks wait, too: there is a fixed number of locks. Where the file system has none, all go on.
        """
        name = str(xxhash.xxh3_64_intdigest(f"{key}/{number}".encode()) % LOCKS)
        try:
            lock = open(self._locks / name, "wb")
        except OSError:
            yield
            return
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:
                pass
            yield

    def _path(self, key: str, number: int) -> Path:
        return self._blocks / key[:2] / key / str(number)

    def _make_room(self, size: int) -> None:
        """See to it that `size` bytes more still leave a tenth of the limit free."""
        self._written += size
        if self._written <= self.limit // 100:  # ten processes stay below the limit between two looks
            return
        self._written = 0
        for _ in range(EVICTIONS):
            if not self._evict(size):
                return

    def _evict(self, size: int) -> bool:
        """Delete the blocks that were not used for longest; False where there is no need to."""
        times, sizes = array("d"), array("q")
        for _, stat in self._all():
            times.append(stat.st_mtime)
            sizes.append(stat.st_size)
        if sum(sizes) + size <= self.limit * 9 // 10:
            return False
        order = np.argsort(np.array(times))[::-1]  # the latest first
        kept = int(np.searchsorted(np.cumsum(np.array(sizes)[order]), self.limit * 8 // 10 - size, side="right"))
        if kept == len(times):
            return False
        newest_to_go = times[int(order[kept])]
        for path, stat in self._all():
            if stat.st_mtime <= newest_to_go:
                try:
                    os.unlink(path)
                except FileNotFoundError:  # another process evicts, too
                    pass
        return True

    def _all(self) -> Iterator[tuple[str, os.stat_result]]:
        """Every file among the blocks; also those that a killed process left under a temporary name."""
        for folder, _, names in os.walk(self._blocks):
            for name in names:
                path = f"{folder}/{name}"
                try:
                    yield path, os.stat(path)
                except FileNotFoundError:
                    pass


def _checksum(key: str, number: int, block: bytes) -> bytes:
    digest = xxhash.xxh3_64(f"{key}/{number}".encode())
    digest.update(block)
    return digest.digest()
