"""Files to read: on this machine or behind a URL, plain or compressed, as one buffered stream of bytes."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import fsspec
import zstandard

from llama_dist.errors import UserError
from llama_dist.files import BLOCK

BUFFER = 1 << 20
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
# zstd unpacks what it is given in one go, up to 32,768 times as much: 16 MiB of this, held twice.
ZSTD_BLOCK = 512
ZSTD_WINDOW = 1 << 31  # as `zstd --long=31` writes
NOT_THERE = "there is no such file"


class DamagedFile(Exception):
    """A compressed file that is not what was written; what was unpacked before that was found may be wrong, too.

    That holds for one that ends too early as well: where a wrong bit hides the end, all is garbled from there on.
    """


def is_url(path: str) -> bool:
    return "://" in path


def name_of(path: str) -> str:
    """The last part of a path or URL, in small letters."""
    return PurePosixPath(urlsplit(path).path if path.startswith(("http://", "https://")) else path).name.lower()


def compression_of(path: str) -> str | None:
    return next((suffix for suffix in COMPRESSIONS if name_of(path).endswith(suffix)), None)


@contextmanager
def open_raw(path: str, *, sequential: bool = False) -> Iterator[io.BufferedReader]:
    """The bytes of a file as they are stored. `sequential`: nobody will seek, which suits some servers better."""
    if not is_url(path):
        with open(path, "rb", buffering=BUFFER) as file:
            yield file
        return
    with remote(path):
        options = {"block_size": 0} if sequential and path.startswith("http") else {"block_size": BLOCK}
        source = fsspec.open(path, **options).open()
    with source, io.BufferedReader(_Remote(source, path), BUFFER) as file:
        yield file


@contextmanager
def open_input(path: str, *, sequential: bool = False) -> Iterator[io.BufferedReader]:
    """The bytes of a file, unpacked where its suffix says so.

    Opening and reading raise OSError, UserError for a URL that fails, and DamagedFile. A compressed file on this
    machine is read twice: first to its end, where its checksum is, so that no damaged text comes out.
    """
    compression = compression_of(path)
    if compression is None:
        with open_raw(path, sequential=sequential) as file:
            yield file
        return
    if not is_url(path):
        _check(path, compression)
    with ExitStack() as stack:
        raw = stack.enter_context(open_raw(path, sequential=True))
        yield stack.enter_context(io.BufferedReader(_Unpacked(raw, compression), BUFFER))


@contextmanager
def remote(path: str) -> Iterator[None]:
    """Whatever a file system behind a URL raises becomes a UserError: each has errors of its own."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path}: {NOT_THERE}; check the URL") from error
    except ImportError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:
        found = f"{type(error).__name__}: {str(error).strip()[:300]}"
        raise UserError(f"{path}: cannot be read ({found}); check the URL and try again") from error


def _check(path: str, compression: str) -> None:
    """Read a compressed file to its end. Raises DamagedFile."""
    with open_raw(path) as raw, io.BufferedReader(_Unpacked(raw, compression), BUFFER) as file:
        while file.read1(BUFFER):
            pass


class _Remote(io.RawIOBase):
    """A file of fsspec whose every error names it."""

    def __init__(self, file: Any, path: str) -> None:
        self._file, self._path = file, path

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with remote(self._path):
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: Any) -> int:
        with remote(self._path):
            content = self._file.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


class _Unpacked(io.RawIOBase):
    """The content of a compressed file."""

    def __init__(self, raw: io.BufferedReader, compression: str) -> None:
        self._empty = not raw.peek(1)
        self._read1 = _UNPACKERS[compression](raw)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._empty:
            raise DamagedFile("it is empty")
        try:
            content = self._read1(len(buffer))
        except EOFError as error:
            raise DamagedFile("it ends too early") from error
        except (zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
            raise DamagedFile(str(error)) from error
        except OSError as error:
            if error.errno is not None:  # of the disk; those of bz2 and gzip have no number
                raise
            raise DamagedFile(str(error)) from error
        buffer[: len(content)] = content
        return len(content)


def _zstd(raw: BinaryIO) -> Callable[[int], bytes]:
    """read1 of a zstd file. The library's own readers take a truncated file for a whole one."""
    unpacked = _zstd_blocks(raw)
    rest = memoryview(b"")

    def read1(size: int) -> bytes:
        nonlocal rest
        if not rest:
            rest = memoryview(next(unpacked, b""))
        content, rest = bytes(rest[:size]), rest[size:]
        return content

    return read1


def _zstd_blocks(raw: BinaryIO) -> Iterator[bytes]:
    frame = None
    while block := raw.read(ZSTD_BLOCK):
        while block:
            if frame is None:
                frame = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()
            if content := frame.decompress(block):
                yield content
            block = b""
            if frame.eof:
                frame, block = None, frame.unused_data
    if frame is not None:
        raise EOFError


_UNPACKERS: dict[str, Callable[[Any], Callable[[int], bytes]]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw, mode="rb").read1,
    ".bz2": lambda raw: bz2.BZ2File(raw).read1,
    ".xz": lambda raw: lzma.LZMAFile(raw).read1,
    ".zst": _zstd,
}
