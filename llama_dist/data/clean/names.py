"""Ids and sizes of a unit's documents, to be looked up by number without reading the texts again."""

from __future__ import annotations

from pathlib import Path

import numpy as np

_ENTRY = np.dtype([("offset", "<u8"), ("length", "<u4"), ("size", "<u8")])
_BATCH = 1 << 14


class NamesWriter:
    """PATH.text has the ids one behind the other, PATH.index where each is, and the size of its document."""

    def __init__(self, path: Path) -> None:
        self._text, self._index = (path.with_suffix(end).open("xb") for end in (".text", ".index"))
        self._offset = 0
        self._entries: list[tuple[int, int, int]] = []

    def add(self, name: str, size: int) -> None:
        content = name.encode()
        self._text.write(content)
        self._entries.append((self._offset, len(content), size))
        self._offset += len(content)
        if len(self._entries) >= _BATCH:
            self._write()

    def _write(self) -> None:
        self._index.write(np.array(self._entries, _ENTRY).data)
        self._entries = []

    def close(self) -> None:
        self._write()
        self._text.close()
        self._index.close()


def names_of(path: Path, numbers: np.ndarray) -> list[str]:
    """The ids of the documents with these numbers."""
    if not len(numbers):
        return []
    entries = np.fromfile(path.with_suffix(".index"), _ENTRY)[numbers]
    names = []
    with path.with_suffix(".text").open("rb") as file:
        for offset, length, _ in entries.tolist():
            file.seek(offset)
            names.append(file.read(length).decode())
    return names


def sizes_of(path: Path) -> np.ndarray:
    """uint64: the bytes of each document's text."""
    return np.fromfile(path.with_suffix(".index"), _ENTRY)["size"]
