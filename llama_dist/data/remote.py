"""Shards behind a URL (s3://, gs://, https://, hf://, ...), read in blocks that a cache on this machine keeps."""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import xxhash

from llama_dist.data.block_cache import BlockCache
from llama_dist.data.server import PART, Server
from llama_dist.data.storage import File, LocalStorage, Storage, check_size
from llama_dist.errors import RunError, UserError

# A sample of 2,048 tokens is 4 kB: larger blocks bring more that nobody asked for, smaller ones take more requests.
BLOCK = 256 << 10
BLOCKS_IN_MEMORY = 32
FETCHERS = 16  # requests under way at a time for what is wanted soon
WHOLE = -1  # in place of a block's number: all of the file


def is_url(path: str | Path) -> bool:
    return "://" in str(path)


def open_storage(path: str | Path, *, cache: str | Path | None = None, cache_gb: float = 50.0) -> Storage:
    """The folder at a path or URL; `cache`, of at most `cache_gb` GB (10^9 bytes), keeps what was read of a URL.

    Raises UserError for a URL that no installed package can read.
    """
    if is_url(path) and not str(path).startswith("file://"):
        folder = Path(cache).expanduser() if cache is not None else default_cache()
        return RemoteStorage(Server(str(path)), BlockCache(folder, int(cache_gb * 1e9)))
    return LocalStorage(Path(str(path).removeprefix("file://")))


def default_cache() -> Path:
    """The folder for caches that the XDG Base Directory Specification names."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama_dist"


@dataclass(frozen=True)
class Block:
    """Bytes [start, stop) of a file, known to the cache as block `number` of `key`."""

    name: str
    key: str
    size: int
    number: int

    @property
    def start(self) -> int:
        return self.number * BLOCK

    @property
    def stop(self) -> int:
        return min(self.start + BLOCK, self.size)


class RemoteStorage:
    """A folder behind a URL.

    What comes is held to the length that was asked for, and what the cache gives to its checksum; that the server
    itself gives something wrong, `llama-dist verify` notices. A web server without ranges has each file fetched whole.
    Raises UserError and RunError as Server does.
    """

    slow = True

    def __init__(self, server: Server, cache: BlockCache) -> None:
        self.path = server.url
        self._server, self._cache = server, cache
        self.load = lru_cache(maxsize=BLOCKS_IN_MEMORY)(self._load)
        self._soon: queue.SimpleQueue[Callable[[], object] | None] | None = None

    def parent(self) -> tuple[Storage, str]:
        server, name = self._server.parent()
        return RemoteStorage(server, self._cache), name

    def exists(self, name: str) -> bool:
        try:
            self._server.info(name)
        except UserError:
            return False
        return True

    def read(self, name: str) -> bytes:
        return self._server.read(name)

    def open(self, name: str, size: int | None = None, checksum: str | None = None) -> File:
        """What is cached is known by the checksum; without one, by what the server says of the file."""
        if size is None or checksum is None:
            info = self._server.info(name)
            check_size(f"{self.path}/{name}", info["size"], size)
            size = int(info["size"])
            told = [str(info.get(key)) for key in ("ETag", "etag", "LastModified", "Last-Modified", "mtime", "created")]
            checksum = checksum or f"{self.path}/{name} {told}"
        return RemoteFile(self, name, size, xxhash.xxh3_128(f"{checksum} {size} {BLOCK}".encode()).hexdigest())

    def whole(self, name: str, size: int) -> Iterator[bytes]:
        if not self._server.has_ranges(name):
            yield from self._server.stream(name)
            return
        for start in range(0, size, PART):
            yield self._server.read_range(name, start, min(start + PART, size))

    def fetch_soon(self, block: Block) -> None:
        """In the background, by threads that end with the process, whatever is left to do."""
        if self._cache.has(block.key, block.number):
            return
        if self._soon is None:
            self._soon = queue.SimpleQueue()
            weakref.finalize(self, _stop, self._soon)
            for _ in range(FETCHERS):
                threading.Thread(target=_work, args=(self._soon,), daemon=True).start()
        self._soon.put(lambda: self._cached(block) or self._fetch(block))

    def _load(self, block: Block) -> bytes:
        return self._cached(block) or self._fetch(block)

    def _cached(self, block: Block) -> bytes | None:
        found = self._cache.get(block.key, block.number)
        return found if found is not None and len(found) == block.stop - block.start else None

    def _fetch(self, block: Block) -> bytes:
        """From the server into the cache, while others that want the same wait for it."""
        ranges = self._server.has_ranges(block.name)
        with self._cache.alone(block.key, block.number if ranges else WHOLE):
            if (found := self._cached(block)) is not None:
                return found
            if not ranges:
                return self._server.ask(block.name, lambda: self._fetch_file(block))
            found = self._server.read_range(block.name, block.start, block.stop)
            self._cache.put(block.key, block.number, found)
            return found

    def _fetch_file(self, wanted: Block) -> bytes:
        """Put all blocks of a file into the cache as they come, and return the one that is wanted."""
        if wanted.size > self._cache.limit * 8 // 10:
            raise UserError(
                f"{self.path}/{wanted.name}: the server gives only whole files, and its {wanted.size} bytes do not fit "
                f"into the cache of {self._cache.limit}; raise data.cache_gb, or use a server that has ranges"
            )
        came, found = 0, b""
        for number, content in enumerate(_in_blocks(self._server.stream(wanted.name))):
            block, came = replace(wanted, number=number), came + len(content)
            if came != block.stop:
                break
            self._cache.put(block.key, number, content)
            found = content if number == wanted.number else found
        if came != wanted.size:
            raise OSError(f"{came} bytes or more came, expected {wanted.size}")
        return found


class RemoteFile:
    """A file of a RemoteStorage, read in blocks."""

    def __init__(self, storage: RemoteStorage, name: str, size: int, key: str) -> None:
        self.path, self.size = f"{storage.path}/{name}", size
        self._storage, self._name, self._key = storage, name, key

    def read_into(self, buffer: memoryview, at: int) -> None:
        if at + len(buffer) > self.size:
            end = at + len(buffer)
            raise UserError(f"{self.path}: ends at byte {self.size}, expected {end}; copy the shards again")
        done = 0
        while done < len(buffer):
            block = self._block((at + done) // BLOCK)
            offset = at + done - block.start
            part = self._storage.load(block)[offset : offset + len(buffer) - done]
            buffer[done : done + len(part)] = part
            done += len(part)

    def prefetch(self, at: int, size: int) -> None:
        for number in range(at // BLOCK, -(-min(at + size, self.size) // BLOCK)):
            self._storage.fetch_soon(self._block(number))

    def _block(self, number: int) -> Block:
        return Block(self._name, self._key, self.size, number)


def _in_blocks(parts: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for part in parts:
        rest += part
        whole = len(rest) // BLOCK * BLOCK
        yield from (rest[at : at + BLOCK] for at in range(0, whole, BLOCK))
        rest = rest[whole:]
    if rest:
        yield rest


def _work(jobs: queue.SimpleQueue[Callable[[], object] | None]) -> None:
    while (job := jobs.get()) is not None:
        try:
            job()
        except (UserError, RunError):  # whoever reads the block will be told
            pass


def _stop(jobs: queue.SimpleQueue[Callable[[], object] | None]) -> None:
    for _ in range(FETCHERS):
        jobs.put(None)
