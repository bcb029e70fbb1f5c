"""Checkpoints in an object store (s3://, gs://, abfs://, ...), through fsspec: no renames, and one atomic put.

    step-00000300/MANIFEST.json                     put last, in one request: what makes it a checkpoint
    step-00000300/attempt-7/rank-00000.bin ...      what the run's 7th attempt wrote; a second draft is attempt-7.2

An attempt's files are believed only when the manifest names its folder. So a draft never touches what is committed,
and a checkpoint is replaced, also by one of another attempt, in the same one put.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from math import prod
from types import TracebackType
from typing import Any

import fsspec
import numpy as np
import xxhash
from fsspec import AbstractFileSystem
from fsspec.spec import AbstractBufferedFile
from torch import Tensor

from llama_dist.boxes import Box
from llama_dist.checkpoint.places import COMMITTED, MANIFEST, Place
from llama_dist.errors import UserError

PART = 32 << 20  # bytes of one upload: S3 takes at most 10,000 of a file, which may so have 312 GiB
RANGE, RANGES = 16 << 20, 4  # bytes of one read, and how many are under way together
BLOCK = 64 << 20  # bytes of whole rows that are read at a time where only some columns are wanted
ITEM = 4  # bytes: float32

FOLDER = re.compile(r"attempt-(\d+)(?:\.(\d+))?")
# The manifest as it came, in one object with the name of the folder that holds its files.
WRAPPED = re.compile(rb'\{"folder": "(attempt-[\d.]+)", "manifest": (.*)\}', re.DOTALL)


class ObjectPlace(Place):
    """A folder of an object store, at a URL that fsspec knows.

    Safe to use from any thread: what the remote file systems do, they do in one thread of fsspec's own, for whoever
    asks. After a fork that thread is gone, and a file system is made anew.

    Raises UserError for a URL that cannot be written to with the packages installed; its methods raise OSError with the
    URL, whatever the store's own library raises, after the tries that it makes.
    """

    def __init__(self, url: str) -> None:
        self.where = url.rstrip("/")
        self._folders: dict[str, str] = {}  # of each checkpoint whose manifest was read, the folder that it names
        self._drafts: Counter[tuple[str, int]] = Counter()
        if self.where.startswith(("http://", "https://")):
            raise UserError(
                f"{self.where}: checkpoints cannot be kept on a web server; use a folder or an object store (s3://, gs://)"
            )
        try:
            self._connect()
        except (ImportError, ValueError) as error:  # the text names the package to install, or the kinds of URL
            raise UserError(f"{self.where}: checkpoints cannot be kept there: {error}") from error

    def _connect(self) -> None:
        # What it lists is never kept: other processes write there.
        files, self._root = fsspec.core.url_to_fs(self.where, use_listings_cache=False)
        _try_again_where_refused(files)
        self._pid, self._connected = os.getpid(), files

    @property
    def _files(self) -> AbstractFileSystem:
        if self._pid != os.getpid():
            self._connect()
        return self._connected

    def names(self) -> list[str]:
        found = [(int(m[1]), name) for name in self._list("") if (m := COMMITTED.fullmatch(name))]
        return [name for _, name in sorted(found, reverse=True) if MANIFEST in self._list(name)]

    def draft(self, name: str, attempt: int) -> str:
        # Each call gives another folder, which all ranks count alike: what an attempt gave up on this step may be being
        # deleted even now, and what it committed must stay.
        self._drafts[name, attempt] += 1
        count = self._drafts[name, attempt]
        return f"{name}/attempt-{attempt}" + (f".{count}" if count > 1 else "")

    def begin(self, draft: str) -> None:
        name, _, folder = draft.partition("/")
        with suppress(FileNotFoundError, ValueError):
            self.manifest(name)
            if self._folders[name] == folder:
                raise OSError(f"{self.where}/{draft}: holds a checkpoint, which this attempt saved before it was begun again")

    def create(self, draft: str, file: str) -> HashingObject:
        return HashingObject(self._files, self._path(f"{draft}/{file}"), f"{self.where}/{draft}/{file}")

    def commit(self, draft: str, name: str, manifest: bytes) -> None:
        folder = draft.rpartition("/")[2]
        key = f"{name}/{MANIFEST}"
        with self._told(key, "written"):
            self._files.pipe_file(self._path(key), b'{"folder": "%b", "manifest": %b}' % (folder.encode(), manifest))
        self._folders[name] = folder
        with suppress(OSError):  # it is committed; what stays of another attempt, `sweep` deletes
            self._delete_attempts(name, but=folder)

    def abandon(self, draft: str) -> None:
        with suppress(OSError):
            self._delete(draft)

    def manifest(self, name: str) -> bytes:
        key = f"{name}/{MANIFEST}"
        with self._told(key, "read"):
            found = WRAPPED.fullmatch(self._files.cat_file(self._path(key)))
        if not found:
            raise ValueError("it does not begin by naming the folder of its files, or was cut short")
        self._folders[name] = found[1].decode()
        return found[2]

    def read_box(self, name: str, file: str, start: int, shape: tuple[int, ...], part: Box, into: Tensor) -> None:
        key = self._key(name, file)
        target, row = into.numpy(), ITEM * prod(shape[1:])
        with self._told(key, "read"):
            if part.shape[1:] == shape[1:]:  # whole rows follow each other
                self._read_into(key, start + part.offset[0] * row, memoryview(target).cast("B"))
                return
            rows = max(1, BLOCK // row)
            for at in range(0, part.shape[0], rows):
                block = np.empty((min(rows, part.shape[0] - at), *shape[1:]), dtype=np.float32)
                self._read_into(key, start + (part.offset[0] + at) * row, memoryview(block).cast("B"))
                target[at : at + len(block)] = block[(slice(None), *part.slices[1:])]

    def check(self, name: str, file: str, *, size: int, checksum: str | None) -> str | None:
        try:
            key = self._key(name, file)
            with self._told(key, "read"):
                found = self._files.info(self._path(key))["size"]
                if found != size:
                    return f"{self.where}/{key}: has {found} bytes, expected {size}"
                if checksum is None:
                    return None
                digest = xxhash.xxh3_128()
                for block in self._ranges(key, 0, size):
                    digest.update(block)
        except (OSError, ValueError) as error:
            return str(error)
        if digest.hexdigest() != checksum:
            return f"{self.where}/{key}: xxh3-128 is {digest.hexdigest()}, expected {checksum}"
        return None

    def discard(self, name: str) -> None:
        key = f"{name}/{MANIFEST}"
        with self._told(key, "deleted"):
            self._files.rm_file(self._path(key))
        self._folders.pop(name, None)
        self._delete_attempts(name)

    def sweep(self) -> list[str]:
        try:
            names = [name for name in self._list("") if COMMITTED.fullmatch(name)]
        except OSError as error:
            return [str(error)]
        problems = []
        for name in names:
            try:
                committed = MANIFEST in self._list(name)
                if committed:
                    self.manifest(name)
                self._delete_attempts(name, but=self._folders[name] if committed else None)
            except OSError as error:
                problems.append(str(error))
            except ValueError:  # a damaged manifest, which nobody takes for a reason to delete what it may have named
                pass
        return problems

    def _path(self, key: str) -> str:
        return f"{self._root.rstrip('/')}/{key}"

    def _key(self, name: str, file: str) -> str:
        """A file of the checkpoint whose manifest was read last under this name."""
        if name not in self._folders:
            self.manifest(name)
        return f"{name}/{self._folders[name]}/{file}"

    def _list(self, key: str) -> list[str]:
        """The names in a folder; none where there is no such folder, which no store tells from an empty one."""
        with self._told(key, "listed"):
            try:
                entries = self._files.ls(self._path(key).rstrip("/"), detail=False)
            except FileNotFoundError:
                return []
        return [entry.rstrip("/").rpartition("/")[2] for entry in entries]

    def _delete_attempts(self, name: str, but: str | None = None) -> None:
        for folder in self._list(name):
            if FOLDER.fullmatch(folder) and folder != but:
                self._delete(f"{name}/{folder}")

    def _delete(self, key: str) -> None:
        path = self._path(key)
        with self._told(key, "deleted"):
            with suppress(FileNotFoundError):
                self._files.rm(path, recursive=True)
            if left := self._files.find(path):  # s3fs says nothing of an object that may not be deleted
                raise OSError(f"{len(left)} objects are still there; do the credentials allow it?")

    def _read_into(self, key: str, start: int, view: memoryview) -> None:
        at = 0
        for block in self._ranges(key, start, start + len(view)):
            view[at : at + len(block)] = block
            at += len(block)

    def _ranges(self, key: str, start: int, stop: int) -> Iterator[bytes]:
        """Bytes [start, stop) of an object, in order, several ranges being fetched together."""
        path = self._path(key)
        for at in range(start, stop, RANGE * RANGES):
            starts = list(range(at, min(at + RANGE * RANGES, stop), RANGE))
            stops = [min(begin + RANGE, stop) for begin in starts]
            blocks = self._files.cat_ranges([path] * len(starts), starts, stops)
            for begin, end, block in zip(starts, stops, blocks, strict=True):
                if isinstance(block, BaseException):
                    raise block
                if len(block) != end - begin:
                    raise OSError(f"it ends at byte {begin + len(block)}; it was cut short after it was checked")
                yield block

    def _told(self, key: str, what: str) -> AbstractContextManager[None]:
        return told(f"{self.where}/{key}", what)


class HashingObject:
    """A new object: as `files.HashingFile`, in parts of `PART` bytes, of which at most two are in memory.

    It is there when the `with` block ends without an error, and after an error not at all.
    """

    def __init__(self, files: AbstractFileSystem, path: str, url: str) -> None:
        self._files, self._path, self._url = files, path, url
        self._hash = xxhash.xxh3_128()
        self.size = 0
        with told(url, "written"):
            self._file = files.open(path, "wb", block_size=PART)

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        self._hash.update(view)
        with told(self._url, "written"):
            while len(view):
                took = self._file.write(view[: PART - self.size % PART])  # so that all parts are of one size
                self.size += took
                view = view[took:]

    @property
    def checksum(self) -> str:
        return self._hash.hexdigest()

    def __enter__(self) -> HashingObject:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self._give_up()
            return
        try:
            with told(self._url, "written"):
                self._file.close()
                found = self._files.info(self._path)["size"]
                if found != self.size:
                    raise OSError(f"{found} bytes arrived of {self.size}")
        except OSError:
            self._give_up()
            raise

    def _give_up(self) -> None:
        """End the upload without an object, as far as the store still answers; what stays is named by no manifest."""
        with suppress(Exception):
            if isinstance(self._file, AbstractBufferedFile):
                self._file.closed = True  # or the garbage collector would close it, which completes the upload
                self._file.discard()
            else:
                self._file.close()
            self._files.rm_file(self._path)


def _try_again_where_refused(files: AbstractFileSystem) -> None:
    """Have s3fs try again, as for other failures, where a connection is refused or reset while a store starts anew."""
    s3, errors = sys.modules.get("s3fs.core"), sys.modules.get("botocore.exceptions")
    if s3 and errors and isinstance(files, s3.S3FileSystem):
        if errors.EndpointConnectionError not in s3.S3_RETRYABLE_ERRORS:
            s3.add_retryable_error(errors.EndpointConnectionError)


@contextmanager
def told(url: str, what: str) -> Iterator[None]:
    """Raise whatever is raised inside as OSError with the URL; each kind of store has errors of its own."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{url}: cannot be {what}: no such object or bucket") from error
    except OSError as error:
        raise OSError(f"{url}: cannot be {what}: {error.strerror or error}") from error
    except Exception as error:
        text = str(error).strip().partition("\n")[0][:300]
        raise OSError(f"{url}: cannot be {what}: {type(error).__name__}" + (f": {text}" if text else "")) from error
