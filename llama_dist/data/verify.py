"""Shards held to all that they say of themselves: checksums, ids, indices and counts; every problem is found."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from llama_dist.data.manifest import MANIFEST, Manifest, read_manifest
from llama_dist.data.megatron import Index
from llama_dist.data.remote import open_storage
from llama_dist.data.shards import no_manifest
from llama_dist.data.storage import Storage
from llama_dist.data.tokenizer import load_tokenizer
from llama_dist.data.words import counted
from llama_dist.errors import RunError, UserError


@dataclass
class Found:
    """What one file, or all, turned out to hold. `max_id` is -1 where there are no tokens."""

    bytes: int = 0
    tokens: int = 0
    documents: int = 0
    max_id: int = -1
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Verified:
    """All that was found, and in words what was checked."""

    checks: list[str]
    problems: list[str]


@dataclass(frozen=True)
class Expected:
    """What the files of a shard directory or bare pair are held to. `vocab_size` None: ids from 0 on."""

    storage: Storage
    files: Mapping[str, Mapping[str, Any]]  # by name; of a bare pair without sizes and checksums
    dtype: np.dtype
    vocab_size: int | None


def verify_shards(
    path: str | Path, *, tokenizer: str | Path | None = None, storage: Storage | None = None, workers: int | None = None
) -> Verified:
    """Read every byte of a shard directory, or of a Megatron pair given by its prefix; path or URL.

    Holds each file to its size and checksum, each id to the vocabulary (the manifest's or that of `tokenizer`), each
    index to its .bin file, and the counts to the manifest's. `workers` threads take a file each and a few MB of memory.
    Raises UserError where there is nothing that could be checked.
    """
    storage = storage or open_storage(path)
    manifest: Manifest | None = None
    problems = []
    if storage.exists(MANIFEST):
        manifest = read_manifest(storage)
        expected = Expected(storage, manifest.files, np.dtype(manifest.dtype), manifest.tokenizer["vocab_size"])
    else:
        storage, name = storage.parent()
        if not storage.exists(f"{name}.idx"):
            raise no_manifest(path)
        dtype = Index(storage.open(f"{name}.idx")).dtype
        expected = Expected(storage, {f"{name}.bin": {}, f"{name}.idx": {}}, dtype, None)
    if tokenizer is not None:
        known = load_tokenizer(tokenizer)
        if manifest is not None and known.fingerprint != manifest.tokenizer["fingerprint"]:
            problems.append(
                f"{path}: was made with another tokenizer ({manifest.tokenizer['file']}, sha256 "
                f"{manifest.tokenizer['fingerprint'][:12]}) than {tokenizer} (sha256 {known.fingerprint[:12]})"
            )
        expected = Expected(storage, expected.files, expected.dtype, known.vocab_size)
    with ThreadPoolExecutor(workers or min(16, len(os.sched_getaffinity(0)))) as pool:
        found = list(pool.map(partial(_check_file, expected), expected.files))
    total = Found(
        bytes=sum(file.bytes for file in found),
        tokens=sum(file.tokens for file in found),
        documents=sum(file.documents for file in found),
        max_id=max((file.max_id for file in found), default=-1),
    )
    problems += [problem for file in found for problem in file.problems]
    if manifest is not None and (total.tokens, total.documents) != (manifest.tokens, manifest.documents):
        problems.append(
            f"{path}: holds {counted(total.tokens, 'token')} in {counted(total.documents, 'document')}, but its "
            f"{MANIFEST} says {manifest.tokens:,} in {manifest.documents:,}"
        )
    return Verified(_checks(expected, total, manifest), problems)


def _checks(expected: Expected, total: Found, manifest: Manifest | None) -> list[str]:
    sums = "sizes and xxh3-128 checksums" if manifest is not None else "no checksums, since there is no manifest"
    ids = "no vocabulary to hold them to; name one by --tokenizer"
    if expected.vocab_size is not None:
        ids = f"each held to a vocabulary of {expected.vocab_size:,}"
    return [
        f"{counted(len(expected.files), 'file')} of {counted(total.bytes, 'byte')}: {sums}",
        f"{counted(total.tokens, 'id')}, the largest {total.max_id:,}: {ids}",
        f"{counted(total.documents, 'document')}: each index held to its .bin file"
        + (f", counts to {MANIFEST}" if manifest is not None else ""),
    ]


def _check_file(expected: Expected, name: str) -> Found:
    """Everything about one file; what keeps it from being read is a problem, too."""
    found = Found()
    try:
        _check_content(expected, name, found)
        if name.endswith(".idx"):
            _check_index(expected, name, found)
        elif name.endswith(".bin") and name.removesuffix(".bin") + ".idx" not in expected.files:
            found.problems.append(f"{expected.storage.path}/{name}: has no .idx in {MANIFEST}")
    except (UserError, RunError) as error:
        found.problems.append(str(error))
    return found


def _check_content(expected: Expected, name: str, found: Found) -> None:
    """The bytes of a file: how many, their checksum and, of a .bin file, the ids that they are."""
    path, entry = f"{expected.storage.path}/{name}", expected.files[name]
    size = entry["bytes"] if entry else expected.storage.open(name).size
    digest = xxhash.xxh3_128()
    ids = _Ids(expected) if name.endswith(".bin") else None
    for block in expected.storage.whole(name, size):
        digest.update(block)
        found.bytes += len(block)
        if ids is not None:
            ids.add(block)
    if entry and found.bytes != size:
        what = "is cut short" if found.bytes < size else "is too long"
        found.problems.append(f"{path}: {what}: {found.bytes} bytes, expected {size}")
    elif entry and digest.hexdigest() != entry["xxh3_128"]:
        found.problems.append(f"{path}: xxh3-128 is {digest.hexdigest()}, expected {entry['xxh3_128']}")
    if ids is None:
        return
    found.tokens, found.max_id = ids.count, ids.max_id
    found.problems += [f"{path}: {problem}" for problem in ids.problems()]
    if entry.get("tokens", ids.count) != ids.count:
        found.problems.append(f"{path}: holds {ids.count} tokens, but {MANIFEST} says {entry['tokens']}")


class _Ids:
    """Counts the ids of a .bin file as its bytes pass, and those outside the vocabulary."""

    def __init__(self, expected: Expected) -> None:
        self._dtype = expected.dtype
        self._limit = np.iinfo(self._dtype).max + 1 if expected.vocab_size is None else expected.vocab_size
        self.count, self.max_id = 0, -1
        self._rest = b""
        self._wrong, self._first = 0, (0, 0)

    def add(self, block: bytes) -> None:
        block = self._rest + block if self._rest else block
        whole = len(block) // self._dtype.itemsize
        tokens = np.frombuffer(block, dtype=self._dtype, count=whole)
        self._rest = block[whole * self._dtype.itemsize :]
        if not whole:
            return
        largest = int(tokens.max())
        self.max_id = max(self.max_id, largest)
        if largest >= self._limit or tokens.min() < 0:
            wrong = np.flatnonzero((tokens >= self._limit) | (tokens < 0))
            if not self._wrong:
                self._first = (self.count + int(wrong[0]), int(tokens[wrong[0]]))
            self._wrong += len(wrong)
        self.count += whole

    def problems(self) -> list[str]:
        found = []
        if self._wrong:
            found.append(
                f"{self._wrong} of its ids are not from 0 to {self._limit - 1}; "
                f"the first, token {self._first[0]} of the file, is {self._first[1]}"
            )
        if self._rest:
            found.append(f"does not end with a whole token of {self._dtype.itemsize} bytes")
        return found


def _check_index(expected: Expected, name: str, found: Found) -> None:
    """An index against itself, its .bin file and the manifest."""
    partner = name.removesuffix(".idx") + ".bin"
    index = Index(expected.storage.open(name, expected.files[name].get("bytes"), expected.files[name].get("xxh3_128")))
    path = f"{expected.storage.path}/{name}"
    found.documents = index.num_documents
    found.problems += [f"{path}: {problem}" for problem in index.problems()]
    if index.dtype != expected.dtype:
        found.problems.append(f"{path}: its tokens are {index.dtype}, but {MANIFEST} says {expected.dtype}")
    if partner not in expected.files:
        found.problems.append(f"{path}: has no .bin in {MANIFEST}")
        return
    entry = expected.files[partner]
    size = entry["bytes"] if entry else expected.storage.open(partner).size
    if index.num_bytes != size:
        found.problems.append(f"{path}: is of {index.num_bytes} bytes of tokens, but {partner} has {size}")
    if entry.get("documents", index.num_documents) != index.num_documents:
        found.problems.append(
            f"{path}: is of {index.num_documents} documents, but {MANIFEST} says {entry['documents']}"
        )
