"""Requests for files behind a URL, through fsspec: tried again where that may help, and otherwise explained."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import aiohttp
import fsspec

from llama_dist.errors import RunError, UserError

PART = 4 << 20  # bytes of a request by who wants the whole file
WAITS = (0.5, 1.0, 2.0, 4.0)  # seconds before each further try
TIMEOUT = 60.0  # seconds that a request may take, or a stream may pause
TRY_AGAIN = (408, 425, 429)  # the statuses below 500 that pass

T = TypeVar("T")


class Server:
    """The files of the folder at `url`.

    Raises UserError for what is not there, not allowed or not readable with the packages installed, RunError for a
    network or a server that fails again and again.
    """

    def __init__(self, url: str, *, waits: tuple[float, ...] = WAITS, timeout: float = TIMEOUT) -> None:
        self.url, self._waits, self._timeout = url.rstrip("/"), waits, timeout
        self._ranges: bool | None = None if url.startswith(("http://", "https://")) else True
        self._probing = threading.Lock()
        options: dict[str, Any] = {}
        if self._ranges is None:
            # aiohttp ends a response after five minutes in all. And a server may pack what it sends, if it is let.
            limits = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
            options = {"client_kwargs": {"timeout": limits}, "headers": {"Accept-Encoding": "identity"}}
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.url, **options)
        except (ImportError, ValueError) as error:  # the text names the package to install, or the kinds of URL
            raise UserError(f"{self.url}: cannot be read: {error}") from error
        self._limit = {"timeout": timeout} if self._files.async_impl else {}

    def parent(self) -> tuple[Server, str]:
        """The folder that this is in, and its name there; a server or bucket is in none, and stays what it is."""
        if "/" not in self.url.partition("://")[2]:
            return self, ""
        folder, _, name = self.url.rpartition("/")
        return Server(folder, waits=self._waits, timeout=self._timeout), name

    def info(self, name: str) -> dict[str, Any]:
        """What the server says of a file, with its "size"."""
        info: dict[str, Any] = self.ask(name, partial(self._files.info, self._path(name), **self._limit))
        if not isinstance(info.get("size"), int) or info.get("type") == "directory":
            raise UserError(f"{self.url}/{name}: the server does not say how long it is; is it a file?")
        return info

    def read(self, name: str) -> bytes:
        """The whole of a small file."""
        content: bytes = self.ask(name, partial(self._files.cat_file, self._path(name), **self._limit))
        return content

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop), of a server that has ranges."""

        def get() -> bytes:
            content: bytes = self._files.cat_file(self._path(name), start=start, end=stop, **self._limit)
            if len(content) != stop - start:
                raise OSError(f"{len(content)} bytes came in place of those from {start} to {stop}")
            return content

        return self.ask(name, get)

    def stream(self, name: str) -> Iterator[bytes]:
        """All of a file as it comes. Call it through `ask`: a stream that breaks off is begun again by its reader."""
        with self._files.open(self._path(name), "rb", block_size=0) as file:
            while part := file.read(PART):
                yield part

    def has_ranges(self, name: str) -> bool:
        """Whether parts of files can be had; many web servers give the whole, whatever they are asked for."""
        with self._probing:
            if self._ranges is None:
                self._ranges = self.ask(name, partial(self._probe, name))
            return self._ranges

    def _probe(self, name: str) -> bool:
        with self._files.open(self._path(name), "rb", size=2, block_size=1, cache_type="none") as file:
            file.seek(1)
            try:
                file.read(1)
            except ValueError:  # the whole would come
                return False
        return True

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def ask(self, name: str, get: Callable[[], T]) -> T:
        """What `get` returns, in one of several tries; each file system has errors of its own."""
        for wait in (*self._waits, None):
            try:
                return get()
            except (UserError, RunError):
                raise
            except Exception as error:
                problem = _lasting_problem(error)
                if problem is not None:
                    raise UserError(f"{self.url}/{name}: {problem}") from error
                if wait is None:
                    raise RunError(
                        f"{self.url}/{name}: cannot be read, in {len(self._waits) + 1} tries "
                        f"({type(error).__name__}: {_first_line(error)}); check the network and the server"
                    ) from error
            time.sleep(wait)
        raise AssertionError("the last try returns or raises")


def _lasting_problem(error: Exception) -> str | None:
    """Why it is of no use to try again; None: it may be."""
    cause = error.__cause__
    passes = isinstance(cause, aiohttp.ClientConnectionError | asyncio.TimeoutError) or _passes(cause)
    missing = isinstance(error, FileNotFoundError) and not passes  # fsspec takes all trouble of a web server for this
    if missing or (isinstance(error, aiohttp.ClientResponseError) and error.status == 404):
        return "is missing; check the URL, or copy the shards again"
    if isinstance(error, PermissionError):
        return f"may not be read ({_first_line(error)}); check the credentials"
    if isinstance(error, ImportError):
        return f"cannot be read: {error}"
    if isinstance(error, aiohttp.ClientResponseError) and not _passes(error):
        return f"the server answers {error.status} ({error.message}); check the URL and the credentials"
    return None


def _passes(error: BaseException | None) -> bool:
    """Whether it is an answer of a web server that may be another next time."""
    return isinstance(error, aiohttp.ClientResponseError) and (error.status >= 500 or error.status in TRY_AGAIN)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:300]
