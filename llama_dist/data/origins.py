"""Which input each document of a pair of shards came from: the .ids file beside it.

The ids of all documents one after another, each as the number of its input, "=" and the id, or "+" and what the id has
after the name of the input; then a JSON list of the inputs; then where each of these begins and the last ends: int64,
documents + 2.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llama_dist.data.storage import File
from llama_dist.errors import UserError
from llama_dist.files import HashingFile

SUFFIX = ".ids"
OWN, RELATIVE = "=", "+"
ENTRY = np.dtype("<i8")


class OriginWriter:
    """Writes the .ids file of one pair; holds eight bytes a document."""

    def __init__(self, path: Path) -> None:
        self.file = HashingFile(path)
        self._ends = array("q", [0])
        self._inputs: dict[str, int] = {}

    def add(self, ids: Sequence[tuple[str, str]]) -> None:
        """Append (input, id) of some documents."""
        entries = [self._entry(*one) for one in ids]
        for entry in entries:
            self._ends.append(self._ends[-1] + len(entry))
        self.file.write(b"".join(entries))

    def finish(self) -> None:
        inputs = json.dumps(list(self._inputs)).encode()
        self._ends.append(self._ends[-1] + len(inputs))
        self.file.write(inputs)
        self.file.write(np.frombuffer(self._ends, dtype=np.int64).astype(ENTRY, copy=False))

    def _entry(self, path: str, id: str) -> bytes:
        number = self._inputs.setdefault(path, len(self._inputs))
        rest = id.removeprefix(path)
        return f"{number}{RELATIVE if rest != id else OWN}{rest}".encode(errors="backslashreplace")


def read_origin(file: File, document: int, *, documents: int) -> tuple[str, str]:
    """(input, id) of a document, counted within its pair. Raises UserError where the file is not of such a pair."""
    table = file.size - ENTRY.itemsize * (documents + 2)
    try:
        entry = _text(file, table, document)
        inputs = json.loads(_text(file, table, documents))
        kind = RELATIVE if entry.lstrip("0123456789").startswith(RELATIVE) else OWN
        number, rest = entry.split(kind, 1)
        path = inputs[int(number)]
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise UserError(f"{file.path}: is damaged ({error}); copy or make the shards again") from error
    return path, path + rest if kind == RELATIVE else rest


def _text(file: File, table: int, entry: int) -> str:
    bounds = np.empty(2, dtype=ENTRY)
    if table < 0:
        raise ValueError("it is too short for its documents")
    file.read_into(memoryview(bounds).cast("B"), table + ENTRY.itemsize * entry)
    begin, end = bounds.tolist()
    if not 0 <= begin <= end <= table:
        raise ValueError(f"entry {entry} is said to lie at {begin} to {end} of {table} bytes")
    content = bytearray(end - begin)
    file.read_into(memoryview(content), begin)
    return content.decode()
