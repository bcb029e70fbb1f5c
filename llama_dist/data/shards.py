"""Token shards: the .bin/.idx pairs of Megatron-LM and a MANIFEST.json beside them.

A shard directory holds pairs 00000.bin/.idx, 00001.bin/.idx, ...; their tokens are addressed as one long sequence.
"""

from __future__ import annotations

import resource
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import xxhash

from llama_dist.data.manifest import MANIFEST, Manifest, read_manifest
from llama_dist.data.megatron import Index
from llama_dist.data.origins import SUFFIX, read_origin
from llama_dist.data.remote import is_url, open_storage
from llama_dist.data.storage import File, Storage
from llama_dist.errors import RunError, UserError
from llama_dist.files import check_file

MAX_OPEN_INDEXES = 16


def load_manifest(path: str | Path) -> Manifest:
    """Read the manifest of a shard directory or URL. Raises UserError where there is none or it is not one."""
    storage = open_storage(path)
    if not storage.exists(MANIFEST):
        raise no_manifest(path)
    return read_manifest(storage)


def verify(path: str | Path) -> None:
    """Read every file of a shard directory. Raises UserError naming those with a wrong size or checksum."""
    problems = find_damage(path)
    if problems:
        raise UserError("; ".join(problems) + "; copy or make the shards again")


def find_damage(path: str | Path, *, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with the sizes and checksums of a shard directory's files; `parts` callers can share the reading.

    A bare Megatron pair has no checksums to be held to.
    """
    path = Path(path)
    if not path.is_dir():
        return []
    files = sorted(load_manifest(path).files.items())[part::parts]
    found = [check_file(path / name, size=f["bytes"], checksum=f["xxh3_128"]) for name, f in files]
    return [problem for problem in found if problem]


@dataclass(frozen=True)
class Pair:
    """A pair by name, and the sizes and checksums that its files must have (None: any)."""

    name: str
    bin_bytes: int
    idx_bytes: int | None = None
    documents: int | None = None
    bin_checksum: str | None = None
    idx_checksum: str | None = None


class Shards:
    """Reads a shard directory, or one Megatron pair given by its prefix (then `manifest` is None).

    Either is a path or a URL; `storage`, the same place opened, says where blocks of remote files are kept. Opening
    reads MANIFEST.json and no more, however large the corpus is; pairs are opened, and their sizes checked, when they
    are first read. Tokens come through `pread`, not a memory map: the page cache serves both alike, but mapped pages
    count as the memory of each rank that touched them, and a file cut short under a map is a bus error rather than a
    message. Several threads may read at once.

    Raises UserError for what is missing, cut short or not of the format: here, or at the first use of a pair;
    RunError for a server that fails.
    """

    manifest: Manifest | None = None

    def __init__(self, path: str | Path, *, storage: Storage | None = None) -> None:
        self.path = str(path) if is_url(path) else Path(path)
        self._storage = storage or open_storage(path)
        if self._storage.exists(MANIFEST):
            self.manifest = read_manifest(self._storage)
            self.dtype = np.dtype(self.manifest.dtype)
            self._pairs = _pairs_of(self.manifest, where=str(path))
        else:
            self._storage, name = self._storage.parent()
            if not self._storage.exists(f"{name}.idx"):
                raise no_manifest(path)
            index = Index(self._storage.open(f"{name}.idx"))
            self.dtype = index.dtype
            self._pairs = [Pair(name, index.num_bytes, documents=index.num_documents)]
            self._storage.open(f"{name}.bin", index.num_bytes)
        tokens = [pair.bin_bytes // self.dtype.itemsize for pair in self._pairs]
        self._token_starts = [0, *accumulate(tokens)]
        self.num_tokens = self._token_starts[-1]
        self.num_documents = self.manifest.documents if self.manifest else int(self._pairs[0].documents or 0)
        self._open = lru_cache(maxsize=_max_open_files())(self._storage.open)
        self._open_index = lru_cache(maxsize=MAX_OPEN_INDEXES)(partial(_open_index, self._storage, self.dtype))
        if self.manifest is not None and self.num_tokens != self.manifest.tokens:
            raise self._miscounted(self.num_documents)
        if all(pair.documents is not None for pair in self._pairs):
            self._document_starts  # noqa: B018  (says now whether the counts agree)

    def beside(self, name: str) -> tuple[Storage, str]:
        """Where what belongs to these shards as `name` lies: in their directory, or with the prefix of a bare pair."""
        return self._storage, name if self.manifest is not None else f"{self._pairs[0].name}.{name}"

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the whole sequence, in the stored dtype."""
        assert 0 <= start <= stop <= self.num_tokens, f"tokens [{start}, {stop}) of {self.num_tokens}"
        found = np.empty(stop - start, dtype=self.dtype)
        self._read_into(memoryview(found).cast("B"), start)
        return found

    def rows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """`length` tokens from each of `starts`, in this order: (len(starts), length) in the stored dtype."""
        found = np.empty((len(starts), length), dtype=self.dtype)
        if not found.size:
            return found
        tokens = np.asarray(starts).tolist()
        order = sorted(range(len(tokens)), key=tokens.__getitem__)  # pair by pair: each is opened once at most
        first, last = tokens[order[0]], tokens[order[-1]]
        assert 0 <= first and last + length <= self.num_tokens, f"rows {first} to {last + length} of {self.num_tokens}"
        buffer, itemsize, row_bytes = memoryview(found).cast("B"), self.dtype.itemsize, length * self.dtype.itemsize
        if self._storage.slow:
            self.prefetch(starts, length)
        begin = end = 0
        for i in order:
            row, token = buffer[i * row_bytes : (i + 1) * row_bytes], tokens[i]
            if token >= end:
                pair = self._pair_at(token)
                begin, end = self._token_starts[pair : pair + 2]
                read_into = self._bin(pair).read_into
            if token + length <= end:
                read_into(row, (token - begin) * itemsize)
            else:
                self._read_into(row, token)
        return found

    def prefetch(self, starts: np.ndarray, length: int) -> None:
        """Have rows ready soon; only a hint, which never raises."""
        itemsize = self.dtype.itemsize
        for start in np.asarray(starts).tolist():
            try:
                pair = self._pair_at(start)
                self._bin(pair).prefetch((start - self._token_starts[pair]) * itemsize, length * itemsize)
            except (UserError, RunError, IndexError):  # whoever reads it will be told
                return

    def document(self, i: int) -> np.ndarray:
        """The tokens of document `i`, with its bos and eos."""
        return self.tokens(*self.document_span(i))

    def document_span(self, i: int) -> tuple[int, int]:
        """The tokens [start, stop) of the whole sequence that document `i` is."""
        assert 0 <= i < self.num_documents, f"document {i} of {self.num_documents}"
        pair = bisect_right(self._document_starts, i) - 1
        start, stop = self._index(pair).span(i - self._document_starts[pair])
        offset = self._token_starts[pair]
        return offset + start, offset + stop

    def document_at(self, token: int) -> tuple[int, int]:
        """The document that a token is of, and its first token."""
        assert 0 <= token < self.num_tokens, f"token {token} of {self.num_tokens}"
        pair = self._pair_at(token)
        offset, index = self._token_starts[pair], self._index(pair)
        document = index.document_at(token - offset)
        return self._document_starts[pair] + document, offset + index.span(document)[0]

    def origin(self, i: int) -> tuple[str, str] | None:
        """The input that document `i` came from, and its id there; None where the shards do not tell."""
        assert 0 <= i < self.num_documents, f"document {i} of {self.num_documents}"
        pair = bisect_right(self._document_starts, i) - 1
        name = f"{self._pairs[pair].name}{SUFFIX}"
        entry = self.manifest.files.get(name) if self.manifest else None
        if entry is None:
            return None
        first, end = self._document_starts[pair : pair + 2]
        return read_origin(self._open(name, entry["bytes"], entry["xxh3_128"]), i - first, documents=end - first)

    def document_lengths(self) -> np.ndarray:
        """The number of tokens of every document: int64 (num_documents,)."""
        return np.concatenate([np.zeros(0, dtype=np.int64), *self.lengths_by_pair()])

    def lengths_by_pair(self) -> Iterator[np.ndarray]:
        """The lengths of the documents of each pair, for corpora with more documents than fit into memory."""
        for i in range(len(self._pairs)):
            yield self._index(i).document_lengths()

    def pair_of(self, token: int) -> str:
        """The .bin file that holds a token, for messages."""
        return f"{self._storage.path}/{self._pairs[self._pair_at(token)].name}.bin"

    def check_sizes(self) -> None:
        """Raise UserError where a file is missing or not of the size in the manifest, without reading any."""
        for pair in self._pairs:
            self._storage.open(f"{pair.name}.bin", pair.bin_bytes)  # without a checksum: looked for
            self._storage.open(f"{pair.name}.idx", pair.idx_bytes)

    def sample_checksums(self) -> dict[str, str]:
        """A checksum of evenly spread tokens, for shards without a manifest: tells corpora apart without reading all."""
        starts = np.linspace(0, max(self.num_tokens - 4096, 0), 64).astype(np.int64)
        digest = xxhash.xxh3_128(str(self.num_tokens).encode())
        for start in starts.tolist():
            digest.update(self.tokens(start, min(start + 4096, self.num_tokens)).tobytes())
        return {"sampled": digest.hexdigest()}

    def _pair_at(self, token: int) -> int:
        return bisect_right(self._token_starts, token) - 1

    def _read_into(self, buffer: memoryview, start: int) -> None:
        """Fill the buffer with tokens from `start` on, from as many pairs as it takes."""
        itemsize, done = self.dtype.itemsize, 0
        while done < len(buffer):
            token = start + done // itemsize
            pair = self._pair_at(token)
            count = min(len(buffer) - done, (self._token_starts[pair + 1] - token) * itemsize)
            offset = (token - self._token_starts[pair]) * itemsize
            self._bin(pair).read_into(buffer[done : done + count], offset)
            done += count

    def _bin(self, i: int) -> File:
        pair = self._pairs[i]
        return self._open(f"{pair.name}.bin", pair.bin_bytes, pair.bin_checksum)

    def _index(self, i: int) -> Index:
        return self._open_index(self._pairs[i])

    @cached_property
    def _document_starts(self) -> list[int]:
        """The first document of each pair, and their number; from the headers where the manifest does not say."""
        counts = [
            self._index(i).num_documents if pair.documents is None else pair.documents
            for i, pair in enumerate(self._pairs)
        ]
        if sum(counts) != self.num_documents:
            raise self._miscounted(sum(counts))
        return [0, *accumulate(counts)]

    def _miscounted(self, documents: int) -> UserError:
        assert self.manifest is not None, "a bare pair is what its index says"
        return UserError(
            f"{self.path}: holds {self.num_tokens} tokens in {documents} documents, but its {MANIFEST} says "
            f"{self.manifest.tokens} in {self.manifest.documents}; make the shards again"
        )


def no_manifest(path: str | Path) -> UserError:
    """What to tell of a place that holds no shards."""
    if not is_url(path) and not Path(path).is_dir():
        return UserError(f"{path}: there is no such shard directory; make one with `llama-dist prepare`")
    return UserError(f"{path}: has no {MANIFEST}, so it is not a finished shard directory; make it again")


def _pairs_of(manifest: Manifest, *, where: str) -> list[Pair]:
    """The pairs of a shard directory, in the manifest's order."""
    pairs = []
    for name, entry in manifest.files.items():
        if not name.endswith(".bin"):
            continue
        stem = name.removesuffix(".bin")
        index = manifest.files.get(f"{stem}.idx")
        if index is None:
            raise UserError(f"{where}: {MANIFEST} names {name} and no {stem}.idx; make the shards again")
        sums = (entry["xxh3_128"], index["xxh3_128"])
        pairs.append(Pair(stem, entry["bytes"], index["bytes"], entry.get("documents"), *sums))
    return pairs


def _open_index(storage: Storage, dtype: np.dtype, pair: Pair) -> Index:
    """The index of a pair, which must be of the tokens that the manifest tells of."""
    file = storage.open(f"{pair.name}.idx", pair.idx_bytes, pair.idx_checksum)
    index = Index(file)
    found = (index.dtype, index.num_bytes, index.num_documents)
    documents = index.num_documents if pair.documents is None else pair.documents
    if found != (dtype, pair.bin_bytes, documents):
        raise UserError(
            f"{file.path}: is of {found[1]} bytes of {found[0]} in {found[2]} documents, expected "
            f"{pair.bin_bytes} of {dtype} in {documents}; copy or make the shards again"
        )
    return index


def _max_open_files() -> int:
    """So many that pairs are seldom opened again, and several corpora leave enough of what the system allows."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2048 if soft == resource.RLIM_INFINITY else max(16, min(2048, soft // 16))
