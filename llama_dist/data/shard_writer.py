"""Writing token shards."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from llama_dist.data.megatron import DTYPES, HEADER, MAGIC, dtype_for
from llama_dist.data.origins import SUFFIX, OriginWriter
from llama_dist.errors import UserError
from llama_dist.files import HashingFile

PAIR_TOKENS = 1 << 30
PAIR_DOCUMENTS = 1 << 24
MAX_DOCUMENT_TOKENS = (1 << 31) - 1
BLOCK = 1 << 20  # tokens, or documents of an index, that are converted at a time


class ShardWriter:
    """Writes documents into the .bin/.idx pairs of a folder, with the .ids of each, and counts tokens as they pass.

    A pair ends with the document that takes it to `pair_tokens` or to PAIR_DOCUMENTS. The lengths of one pair's
    documents are held, 64 MB at most. Leaving the `with` block closes what is open; `finish` makes it complete.
    """

    def __init__(self, folder: Path, *, vocab_size: int, pair_tokens: int = PAIR_TOKENS) -> None:
        self.dtype = dtype_for(vocab_size)
        self.counts = np.zeros(vocab_size, dtype=np.int64)
        self.num_tokens = 0
        self.num_documents = 0
        self.files: dict[str, dict[str, Any]] = {}
        self._folder = folder
        self._pair_tokens = pair_tokens
        self._num_pairs = 0
        self._bin: HashingFile | None = None
        self._open_files = ExitStack()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open_files.__exit__(kind, error, trace)

    @property
    def unigram_entropy(self) -> float:
        """In nats per token."""
        return unigram_entropy(self.counts)

    def add(self, tokens: np.ndarray, lengths: np.ndarray, ids: Sequence[tuple[str, str]] | None = None) -> None:
        """Append documents: their tokens one after another, and how many each has, one or more.

        `ids`: the input of each and its id there, of all documents or of none.
        """
        if len(lengths) and lengths.max() > MAX_DOCUMENT_TOKENS:
            raise UserError(
                f"document {self.num_documents + int(lengths.argmax())}: has {lengths.max()} tokens; "
                f"at most {MAX_DOCUMENT_TOKENS} fit; cut it up"
            )
        ends = np.cumsum(lengths, dtype=np.int64)
        done = written = 0
        while done < len(lengths):
            file = self._bin or self._begin_pair()
            missing = self._pair_tokens - self._num_pair_tokens
            until = int(np.searchsorted(ends, written + missing)) + 1
            until = min(until, len(lengths), done + PAIR_DOCUMENTS - len(self._lengths))
            end = int(ends[until - 1])
            self._write(file, tokens[written:end])
            self._lengths.frombytes(lengths[done:until].astype(np.int32).tobytes())
            self._num_pair_tokens += end - written
            if ids is not None:
                self._add_ids(ids[done:until])
            if self._num_pair_tokens >= self._pair_tokens or len(self._lengths) >= PAIR_DOCUMENTS:
                self._end_pair(file)
            done, written = until, end
        self.num_tokens += written
        self.num_documents += done

    def finish(self) -> None:
        """Complete the last pair."""
        if self._bin is not None:
            self._end_pair(self._bin)

    def _write(self, file: HashingFile, tokens: np.ndarray) -> None:
        """In blocks: a document may be the whole of memory's worth, and each step of this makes a copy."""
        for start in range(0, len(tokens), BLOCK):
            block = tokens[start : start + BLOCK]
            self.counts += np.bincount(block, minlength=len(self.counts))
            file.write(block.astype(self.dtype))

    def _add_ids(self, ids: Sequence[tuple[str, str]]) -> None:
        if self._ids is None:
            self._ids = OriginWriter(self._folder / f"{self._name}{SUFFIX}")
            self._open_files.enter_context(self._ids.file)
        self._ids.add(ids)

    def _begin_pair(self) -> HashingFile:
        self._name = f"{self._num_pairs:05d}"
        self._num_pairs += 1
        self._ids: OriginWriter | None = None
        self._bin = self._open_files.enter_context(HashingFile(self._folder / f"{self._name}.bin"))
        self._lengths = array("i")
        self._num_pair_tokens = 0
        return self._bin

    def _end_pair(self, bin_file: HashingFile) -> None:
        if self._ids is not None:
            self._ids.finish()
        self._open_files.close()
        self._bin = None
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        with HashingFile(self._folder / f"{self._name}.idx") as index:
            _write_index(index, lengths, self.dtype)
        holds = {"tokens": self._num_pair_tokens, "documents": len(lengths)}
        self.files[f"{self._name}.bin"] = {"bytes": bin_file.size, "xxh3_128": bin_file.checksum, **holds}
        self.files[f"{self._name}.idx"] = {"bytes": index.size, "xxh3_128": index.checksum}
        if self._ids is not None:
            ids = self._ids.file
            self.files[f"{self._name}{SUFFIX}"] = {"bytes": ids.size, "xxh3_128": ids.checksum}


def unigram_entropy(counts: np.ndarray) -> float:
    """The entropy, in nats per token, of tokens that occur `counts` times: int64 (vocabulary,), with some above 0."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def _write_index(file: HashingFile, lengths: np.ndarray, dtype: np.dtype) -> None:
    """The .idx of documents of one sequence each."""
    code = next(code for code, known in DTYPES.items() if known == dtype)
    file.write(HEADER.pack(MAGIC, 1, code, len(lengths), len(lengths) + 1))
    file.write(lengths.astype("<i4", copy=False))
    start = 0
    for at in range(0, len(lengths), BLOCK):
        ends = start + np.cumsum(lengths[at : at + BLOCK], dtype=np.int64) * dtype.itemsize
        file.write(np.concatenate([[start], ends[:-1]]).astype("<i8"))
        start = int(ends[-1])
    for at in range(0, len(lengths) + 1, BLOCK):
        file.write(np.arange(at, min(at + BLOCK, len(lengths) + 1), dtype="<i8"))
