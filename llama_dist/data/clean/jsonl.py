"""Lines of JSON to write and to read again, packed with zstd where the name ends in .zst."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import zstandard

from llama_dist.files import HashingFile

SUFFIXES = (".jsonl.zst", ".jsonl")
_BUFFER = 1 << 20
_LEVEL = 3


class JsonlWriter:
    """A new file of JSON lines; leaving the `with` block without an error puts it on the disk."""

    def __init__(self, path: Path) -> None:
        self.file = HashingFile(path)
        self._packer = zstandard.ZstdCompressor(level=_LEVEL).compressobj() if path.suffix == ".zst" else None
        self._waiting = bytearray()

    def add(self, item: dict[str, Any]) -> None:
        self.add_line(json.dumps(item, ensure_ascii=False).encode() + b"\n")

    def add_line(self, line: bytes) -> None:
        """A line as it is, with its end."""
        self._waiting += line
        if len(self._waiting) >= _BUFFER:
            self._flush()

    def _flush(self) -> None:
        self.file.write(self._packer.compress(self._waiting) if self._packer else self._waiting)
        self._waiting.clear()

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()
            if self._packer:
                self.file.write(self._packer.flush())
        self.file.__exit__(kind, error, trace)


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file that a JsonlWriter wrote, each with its end."""
    with path.open("rb") as raw:
        if path.suffix != ".zst":
            yield from raw
            return
        # Units are joined by putting their frames one behind the other.
        with zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True) as packed:
            yield from io.BufferedReader(packed, _BUFFER)
