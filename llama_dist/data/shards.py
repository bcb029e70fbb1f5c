"""Token shards: the .bin/.idx pairs of Megatron-LM and a MANIFEST.json beside them.

A shard directory holds pairs 00000.bin/.idx, 00001.bin/.idx, ...; their tokens are addressed as one long sequence.
The index file: magic, version, dtype code, number of sequences and of documents (with the end), then the length of
each sequence (int32), its first byte in the .bin (int64), and the first sequence of each document (int64).
"""

from __future__ import annotations

import json
import os
import struct
import weakref
from bisect import bisect_right
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from llama_dist.errors import UserError
from llama_dist.files import check_file

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
MANIFEST = "MANIFEST.json"
FORMAT = "llama_dist token shards v1"


@dataclass(frozen=True)
class Manifest:
    """What a shard directory says of itself, in MANIFEST.json.

    `unigram_entropy` is in nats per token, from the exact counts; `raw_bytes` is the size of the texts in UTF-8,
    for bits per byte; `tokenizer` has file, fingerprint, vocab_size, bos_id, eos_id; `files` and `inputs` have bytes
    and xxh3_128 for each file.
    """

    tokens: int
    documents: int
    raw_bytes: int
    unigram_entropy: float
    dtype: str
    tokenizer: dict[str, Any]
    inputs: list[dict[str, Any]]
    files: dict[str, dict[str, Any]]
    command: str
    format: str = FORMAT

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=2) + "\n").encode()


def dtype_for(vocab_size: int) -> np.dtype:
    """The type that tokens of a vocabulary are stored in: two bytes where they suffice."""
    return DTYPES[8] if vocab_size <= 65535 else DTYPES[4]


def load_manifest(path: str | Path) -> Manifest:
    """Read the manifest of a shard directory. Raises UserError where there is none or it is not one."""
    path = Path(path)
    file = path / MANIFEST
    if not path.is_dir():
        raise UserError(f"{path}: there is no such shard directory; make one with `llama-dist prepare`")
    if not file.is_file():
        raise UserError(f"{path}: has no {MANIFEST}, so it is not a finished shard directory; make it again")
    try:
        values = json.loads(file.read_bytes())
        if isinstance(values, dict) and "tokenizer" not in values:
            raise UserError(f"{path}: is no shard directory: {MANIFEST} is that of something else")
        manifest = Manifest(**values)
    except UserError:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: is damaged ({error}); make the shard directory again") from error
    if manifest.format != FORMAT:
        raise UserError(f"{file}: format is {manifest.format!r}; this version reads {FORMAT!r}; make the shards again")
    return manifest


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


class Shards:
    """Reads a shard directory, or one Megatron pair given by its prefix (then `manifest` is None).

    Tokens come through `pread`, not a memory map: the page cache serves both alike, but mapped pages count as the
    memory of each rank that touched them, and a file cut short under a map is a bus error rather than a message.
    Opening looks at sizes and headers only. Raises UserError for what is missing, cut short or not of the format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest: Manifest | None = None
        if not self.path.is_dir() and Path(f"{path}.idx").is_file():
            prefixes = [self.path]
        else:
            self.manifest = load_manifest(path)
            for name, expected in self.manifest.files.items():
                _check_size(self.path / name, expected["bytes"])
            prefixes = [self.path / name[: -len(".bin")] for name in self.manifest.files if name.endswith(".bin")]
        self._pairs = [_Pair(prefix) for prefix in prefixes]
        self._token_starts = [0, *accumulate(pair.num_tokens for pair in self._pairs)]
        self._document_starts = [0, *accumulate(pair.num_documents for pair in self._pairs)]
        self.num_tokens: int = self._token_starts[-1]
        self.num_documents: int = self._document_starts[-1]
        counts = (self.num_tokens, self.num_documents)
        if self.manifest is not None and counts != (self.manifest.tokens, self.manifest.documents):
            raise UserError(
                f"{self.path}: holds {counts[0]} tokens in {counts[1]} documents, but its {MANIFEST} says "
                f"{self.manifest.tokens} in {self.manifest.documents}; make the shards again"
            )

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the whole sequence, in the stored dtype."""
        assert 0 <= start <= stop <= self.num_tokens, f"tokens [{start}, {stop}) of {self.num_tokens}"
        first = min(bisect_right(self._token_starts, start), len(self._pairs)) - 1
        parts = []
        for pair, offset in zip(self._pairs[first:], self._token_starts[first:], strict=False):
            if offset >= stop and parts:
                break
            parts.append(pair.read(max(start - offset, 0), min(stop - offset, pair.num_tokens)))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def document(self, i: int) -> np.ndarray:
        """The tokens of document `i`, with its bos and eos."""
        assert 0 <= i < self.num_documents, f"document {i} of {self.num_documents}"
        which = bisect_right(self._document_starts, i) - 1
        return self._pairs[which].document(i - self._document_starts[which])

    def sample_checksums(self) -> dict[str, str]:
        """A checksum of evenly spread tokens, for shards without a manifest: tells corpora apart without reading all."""
        starts = np.linspace(0, max(self.num_tokens - 4096, 0), 64).astype(np.int64)
        digest = xxhash.xxh3_128(str(self.num_tokens).encode())
        for start in starts.tolist():
            digest.update(self.tokens(start, min(start + 4096, self.num_tokens)).tobytes())
        return {"sampled": digest.hexdigest()}

    def document_lengths(self) -> np.ndarray:
        """The number of tokens of every document: int64 (num_documents,)."""
        return np.concatenate([pair.document_lengths() for pair in self._pairs])


class _Pair:
    """One .bin/.idx pair."""

    def __init__(self, prefix: Path) -> None:
        self._bin = Path(f"{prefix}.bin")
        index = Path(f"{prefix}.idx")
        self._dtype, num_sequences, num_entries = _read_header(index)
        self.num_documents = num_entries - 1
        _check_size(index, HEADER.size + 12 * num_sequences + 8 * num_entries)
        raw = np.memmap(index, mode="r", offset=HEADER.size)
        lengths = raw[: 4 * num_sequences].view("<i4")
        self._pointers = raw[4 * num_sequences : 12 * num_sequences].view("<i8")
        self._documents = raw[12 * num_sequences :].view("<i8")
        if (self._documents[0], self._documents[-1]) != (0, num_sequences):
            raise UserError(f"{index}: its documents do not cover its {num_sequences} sequences; make it again")
        num_bytes = int(self._pointers[-1]) + int(lengths[-1]) * self._dtype.itemsize if num_sequences else 0
        self.num_tokens = num_bytes // self._dtype.itemsize
        _check_size(self._bin, num_bytes)
        self._handle = os.open(self._bin, os.O_RDONLY)
        weakref.finalize(self, os.close, self._handle)

    def read(self, start: int, stop: int) -> np.ndarray:
        at, end = start * self._dtype.itemsize, stop * self._dtype.itemsize
        blocks = []
        while at < end:
            blocks.append(os.pread(self._handle, end - at, at))
            if not blocks[-1]:
                raise UserError(f"{self._bin}: ended at byte {at} while it was read, expected {end}; was it replaced?")
            at += len(blocks[-1])
        return np.frombuffer(b"".join(blocks), dtype=self._dtype)

    def document(self, i: int) -> np.ndarray:
        return self.read(self._token_of(i), self._token_of(i + 1))

    def document_lengths(self) -> np.ndarray:
        starts = np.append(self._pointers, self.num_tokens * self._dtype.itemsize)[self._documents]
        return np.diff(starts) // self._dtype.itemsize

    def _token_of(self, document: int) -> int:
        """The first token of a document, or the end of the last."""
        sequence = int(self._documents[document])
        if sequence == len(self._pointers):
            return self.num_tokens
        return int(self._pointers[sequence]) // self._dtype.itemsize


def _read_header(index: Path) -> tuple[np.dtype, int, int]:
    """The dtype, the number of sequences and the number of document entries of an index file."""
    if not index.is_file():
        raise UserError(f"{index}: is missing; copy or make the shards again")
    with index.open("rb") as file:
        header = file.read(HEADER.size)
    if header[: len(MAGIC)] != MAGIC:
        raise UserError(f"{index}: is not a Megatron index file (it begins with {header[: len(MAGIC)]!r})")
    if len(header) < HEADER.size:
        raise UserError(f"{index}: is cut short: {len(header)} bytes are fewer than its header of {HEADER.size}")
    _, version, code, num_sequences, num_entries = HEADER.unpack(header)
    if version != 1 or code not in DTYPES or num_entries < 1:
        raise UserError(
            f"{index}: version {version}, dtype code {code}, {num_entries} document entries; "
            "allowed are version 1, code 4 (int32) or 8 (uint16), 1 entry or more"
        )
    return DTYPES[code], num_sequences, num_entries


def _check_size(file: Path, expected: int) -> None:
    if not file.is_file():
        raise UserError(f"{file}: is missing; copy or make the shards again")
    found = file.stat().st_size
    if found != expected:
        what = "is cut short" if found < expected else "is too long"
        raise UserError(f"{file}: {what}: {found} bytes, expected {expected}; copy or make the shards again")
