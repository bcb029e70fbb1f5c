"""The .idx files of Megatron-LM: which sequences and documents the tokens of a .bin file are.

The index file: magic, version, dtype code, number of sequences and of documents (with the end), then the length of
each sequence (int32), its first byte in the .bin (int64), and the first sequence of each document (int64). Megatron-LM
and GPT-NeoX write the same; a document is one sequence, or several.
"""

from __future__ import annotations

import struct

import numpy as np

from llama_dist.data.storage import File, check_size
from llama_dist.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
# Codes 6 and 7 are floating point (Megatron-LM and GPT-NeoX differ in which is which): no tokens.
DTYPES = {code: np.dtype(t) for code, t in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()}
BLOCK_ITEMS = 1 << 16  # entries of an index read at a time


def dtype_for(vocab_size: int) -> np.dtype:
    """The type that tokens of a vocabulary are stored in: two bytes where they suffice."""
    return DTYPES[8] if vocab_size <= 65535 else DTYPES[4]


class Index:
    """An open .idx file. Only its header is read at once, so that any document is found without reading the others.

    Raises UserError for what is cut short, damaged or not of the format.
    """

    def __init__(self, file: File) -> None:
        self._file = file
        self.dtype, self._num_sequences, num_entries = _read_header(file)
        self.num_documents = num_entries - 1
        self._lengths_at = HEADER.size
        self._pointers_at = self._lengths_at + 4 * self._num_sequences
        self._documents_at = self._pointers_at + 8 * self._num_sequences
        size = self._documents_at + 8 * num_entries
        if file.size == size + self._num_sequences and self._num_sequences:
            raise UserError(f"{file.path}: is of a multimodal dataset (a mode for each sequence); only text is read")
        check_size(file.path, file.size, size)
        ends = (self._documents(0, 1)[0], self._documents(num_entries - 1, num_entries)[0])
        if ends != (0, self._num_sequences):
            raise UserError(
                f"{file.path}: its documents do not cover its {self._num_sequences} sequences; make it again"
            )
        self.num_bytes = 0
        if last := self._num_sequences:
            length = self._read(self._lengths_at, "<i4", last - 1, last)
            self.num_bytes = int(self._pointers(last - 1, last)[0]) + int(length[0]) * self.dtype.itemsize

    @property
    def num_tokens(self) -> int:
        return self.num_bytes // self.dtype.itemsize

    def span(self, i: int) -> tuple[int, int]:
        """The tokens [start, stop) of document `i`."""
        start, stop = (self._token_of(int(sequence)) for sequence in self._documents(i, i + 2))
        if not 0 <= start <= stop <= self.num_tokens:
            raise UserError(
                f"{self._file.path}: document {i} is tokens {start} to {stop} of {self.num_tokens}; "
                "it is damaged; copy or make the shards again"
            )
        return start, stop

    def document_at(self, token: int) -> int:
        """Which document a token is of."""
        low, high = 0, self.num_documents  # the last that begins at or before the token is in [low, high)
        while high - low > 1:
            middle = (low + high) // 2
            if self._token_of(int(self._documents(middle, middle + 1)[0])) <= token:
                low = middle
            else:
                high = middle
        start, stop = self.span(low)
        if not start <= token < stop:
            raise UserError(f"{self._file.path}: is damaged: token {token} is of no document; make the shards again")
        return low

    def starts(self, first: int, last: int) -> np.ndarray:
        """The first token of each document of [first, last), then the end of the last: int64 (last - first + 1,)."""
        sequences = self._documents(first, last + 1)
        if (np.diff(sequences) < 0).any() or sequences[0] < 0 or sequences[-1] > self._num_sequences:
            raise UserError(f"{self._file.path}: its documents are not in order; copy or make the shards again")
        low, high = int(sequences[0]), min(int(sequences[-1]) + 1, self._num_sequences)
        pointers = self._pointers(low, high)
        if sequences[-1] == self._num_sequences:
            pointers = np.append(pointers, self.num_bytes)
        return pointers[sequences - low] // self.dtype.itemsize

    def document_lengths(self) -> np.ndarray:
        """The number of tokens of every document: int64 (num_documents,)."""
        lengths = np.empty(self.num_documents, dtype=np.int64)
        for first in range(0, self.num_documents, BLOCK_ITEMS):
            last = min(first + BLOCK_ITEMS, self.num_documents)
            lengths[first:last] = np.diff(self.starts(first, last))
        if len(lengths) and (lengths.min() < 0 or lengths.sum() != self.num_tokens):
            raise UserError(
                f"{self._file.path}: its documents have {lengths.sum()} tokens, the shortest {lengths.min()}, expected "
                f"{self.num_tokens} in all; it is damaged; copy or make the shards again"
            )
        return lengths

    def problems(self) -> list[str]:
        """What is wrong inside: all of the index is read, in blocks."""
        found = []
        end, misplaced, negative = 0, 0, 0
        for first in range(0, self._num_sequences, BLOCK_ITEMS):
            last = min(first + BLOCK_ITEMS, self._num_sequences)
            lengths = self._read(self._lengths_at, "<i4", first, last)
            ends = end + np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
            begins = np.concatenate([[end], ends[:-1]])
            misplaced += int((self._pointers(first, last) != begins).sum())
            negative += int((lengths < 0).sum())
            end = int(ends[-1])
        if negative:
            found.append(f"{negative} of its {self._num_sequences} sequences have a length below 0")
        if misplaced:
            found.append(f"{misplaced} of its {self._num_sequences} sequences do not begin where the one before ends")
        disordered = 0
        for first in range(0, self.num_documents, BLOCK_ITEMS):
            documents = self._documents(first, min(first + BLOCK_ITEMS, self.num_documents) + 1)
            disordered += int((np.diff(documents) < 0).sum())
        if disordered:
            found.append(f"{disordered} of its {self.num_documents} documents end before they begin")
        return found

    def _token_of(self, sequence: int) -> int:
        """The first token of a sequence, or the end of the last."""
        if sequence == self._num_sequences:
            return self.num_tokens
        if not 0 <= sequence < self._num_sequences:
            raise UserError(
                f"{self._file.path}: names sequence {sequence} of {self._num_sequences}; it is damaged; "
                "copy or make the shards again"
            )
        return int(self._pointers(sequence, sequence + 1)[0]) // self.dtype.itemsize

    def _pointers(self, start: int, stop: int) -> np.ndarray:
        return self._read(self._pointers_at, "<i8", start, stop)

    def _documents(self, start: int, stop: int) -> np.ndarray:
        return self._read(self._documents_at, "<i8", start, stop)

    def _read(self, at: int, dtype: str, start: int, stop: int) -> np.ndarray:
        values = np.empty(stop - start, dtype=dtype)
        if stop > start:
            self._file.read_into(memoryview(values).cast("B"), at + start * values.itemsize)
        return values


def _read_header(file: File) -> tuple[np.dtype, int, int]:
    """The dtype, the number of sequences and the number of document entries of an index file."""
    header = bytearray(min(file.size, HEADER.size))
    if header:
        file.read_into(memoryview(header), 0)
    if header[: len(MAGIC)] != MAGIC:
        found = bytes(header[: len(MAGIC)])
        raise UserError(f"{file.path}: is not a Megatron index file (it begins with {found!r})")
    if len(header) < HEADER.size:
        raise UserError(f"{file.path}: is cut short: {len(header)} bytes are fewer than its header of {HEADER.size}")
    _, version, code, num_sequences, num_entries = HEADER.unpack(header)
    if version != 1 or code not in DTYPES or num_entries < 1:
        codes = ", ".join(f"{code} ({dtype.name})" for code, dtype in DTYPES.items())
        raise UserError(
            f"{file.path}: version {version}, dtype code {code}, {num_entries} document entries; "
            f"allowed are version 1, code {codes}, 1 entry or more"
        )
    return DTYPES[code], num_sequences, num_entries
