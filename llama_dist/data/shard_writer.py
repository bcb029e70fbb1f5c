"""Writing token shards."""

from __future__ import annotations

from array import array
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from llama_dist.data.shards import DTYPES, HEADER, MAGIC, dtype_for
from llama_dist.errors import UserError
from llama_dist.files import HashingFile

PAIR_TOKENS = 1 << 30
MAX_DOCUMENT_TOKENS = (1 << 31) - 1


class ShardWriter:
    """Writes documents into the .bin/.idx pairs of a folder, and counts tokens as they pass.

    A pair ends with the document that takes it to `pair_tokens`. Only the lengths of one pair's documents are held.
    Leaving the `with` block closes what is open; `finish` makes it complete.
    """

    def __init__(self, folder: Path, *, vocab_size: int, pair_tokens: int = PAIR_TOKENS) -> None:
        self.dtype = dtype_for(vocab_size)
        self.counts = np.zeros(vocab_size, dtype=np.int64)
        self.num_documents = 0
        self.files: dict[str, dict[str, Any]] = {}
        self._folder = folder
        self._pair_tokens = pair_tokens
        self._bin: HashingFile | None = None
        self._open_files = ExitStack()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open_files.__exit__(kind, error, trace)

    @property
    def num_tokens(self) -> int:
        return int(self.counts.sum())

    @property
    def unigram_entropy(self) -> float:
        """In nats per token."""
        share = self.counts[self.counts > 0] / self.num_tokens
        return float(-(share * np.log(share)).sum())

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: their tokens one after another, and how many each has."""
        self.counts += np.bincount(tokens, minlength=len(self.counts))
        stored = tokens.astype(self.dtype)
        written = end = 0
        for length in lengths.tolist():
            if length > MAX_DOCUMENT_TOKENS:
                raise UserError(
                    f"document {self.num_documents}: has {length} tokens; at most {MAX_DOCUMENT_TOKENS} fit; cut it up"
                )
            file = self._bin or self._begin_pair()
            end += length
            self._lengths.append(length)
            self._num_pair_tokens += length
            self.num_documents += 1
            if self._num_pair_tokens >= self._pair_tokens:
                file.write(stored[written:end])
                written = end
                self._end_pair(file)
        if self._bin is not None and written < end:
            self._bin.write(stored[written:end])

    def finish(self) -> None:
        """Complete the last pair."""
        if self._bin is not None:
            self._end_pair(self._bin)

    def _begin_pair(self) -> HashingFile:
        self._name = f"{len(self.files) // 2:05d}"
        self._bin = self._open_files.enter_context(HashingFile(self._folder / f"{self._name}.bin"))
        self._lengths = array("i")
        self._num_pair_tokens = 0
        return self._bin

    def _end_pair(self, bin_file: HashingFile) -> None:
        self._open_files.close()
        self._bin = None
        with HashingFile(self._folder / f"{self._name}.idx") as index:
            index.write(_index(np.array(self._lengths, dtype="<i4"), self.dtype))
        for suffix, file in (("bin", bin_file), ("idx", index)):
            self.files[f"{self._name}.{suffix}"] = {"bytes": file.size, "xxh3_128": file.checksum}


def _index(lengths: np.ndarray, dtype: np.dtype) -> bytes:
    """The .idx of documents of one sequence each."""
    code = next(code for code, known in DTYPES.items() if known == dtype)
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    pointers = (ends - lengths * np.int64(dtype.itemsize)).astype("<i8")
    documents = np.arange(len(lengths) + 1, dtype="<i8")
    header = HEADER.pack(MAGIC, 1, code, len(lengths), len(documents))
    return header + lengths.tobytes() + pointers.tobytes() + documents.tobytes()
