"""How much of the inputs may be skipped, and where it was."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

from llama_dist.data.documents import with_line
from llama_dist.data.units import EMPTY, MERGED, SKIPPED, Record, Unit, finished, load_record
from llama_dist.errors import UserError

TOLD = 3
HOPELESS = 4  # the documents that are to come may be this many times as dense as those so far
LINE_BYTES = 4 << 30  # that are read, at most, to tell the lines of what was skipped


class SkipLimit:
    """How many documents may be skipped: "20", or "0.1%" of those that there are."""

    def __init__(self, text: str) -> None:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)%|(\d+)", text.strip())
        if not found or (found[1] and Fraction(found[1]) > 100):
            raise UserError(f"max_skipped={text!r}: must be a number of documents such as 0, or a share of them such as 0.1%")
        self.text = text.strip()
        self._share = Fraction(found[1]) / 100 if found[1] else None
        self._count = int(found[2] or 0)

    def allows(self, skipped: int, documents: Fraction | int) -> bool:
        return skipped <= (self._count if self._share is None else self._share * documents)


class Tally:
    """The records of finished units, in the order of the units, as far as there is no gap.

    `advance` takes up what has been finished since and raises UserError where too much was skipped. It is judged after
    each unit, as if those to come had four times as many documents for their bytes, and after the last on what there
    is: so the verdict is a function of the inputs, whoever did what and when.
    """

    def __init__(self, folder: Path, units: list[Unit], limit: SkipLimit) -> None:
        self.records: list[Record] = []
        self.documents = 0
        self.skipped: Counter[str] = Counter()
        self._folder, self._units, self._limit = folder, units, limit
        self._all_bytes = sum(unit.bytes for unit in units)
        self._bytes = 0
        self._first: list[list[str]] = []

    @property
    def faults(self) -> int:
        """How many documents were skipped for something that is wrong with them."""
        return self.skipped.total() - self.skipped[EMPTY]

    def advance(self) -> set[int]:
        """Returns the numbers of all units that are finished: all of them, once they have been put together."""
        done = finished(self._folder)
        while len(self.records) in done:
            record = load_record(self._folder, len(self.records))
            if record is None:
                break
            self._add(record)
        if (self._folder / MERGED).exists():
            return set(range(len(self._units)))
        return done

    def _add(self, record: Record) -> None:
        self._bytes += self._units[len(self.records)].bytes
        self.records.append(record)
        self.documents += record.documents
        self.skipped.update(record.skipped)
        self._first += record.first[: TOLD - len(self._first)]
        seen = self.documents + self.faults
        is_last = len(self.records) == len(self._units)
        expected = seen if is_last else Fraction(seen * HOPELESS * self._all_bytes, max(1, self._bytes))
        if not self._limit.allows(self.faults, expected):
            raise UserError(self._message(seen, is_last=is_last))

    def _message(self, seen: int, *, is_last: bool) -> str:
        first, *others = [f"{with_line(where)}: {reason}" for where, reason in self._first]
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in sorted(self.skipped.items()) if kind != EMPTY)
        where = "in all" if is_last else f"in the first {self._bytes / max(1, self._all_bytes):.1%} of the inputs"
        more = "".join(f"; {other}" for other in others)
        return (
            f"{first} (so {self.faults:,} of {seen:,} documents {where} had to be skipped: {kinds}; "
            f"allowed are {self._limit.text}; mend them, or raise --max-skipped){more}"
        )


def skipped_lines(folder: Path, unit: Unit) -> Iterator[str]:
    """The list of what was skipped in a unit."""
    file = folder / unit.name / SKIPPED
    if file.exists():
        with file.open(encoding="utf-8") as lines:
            yield from lines


class LineNumbers:
    """Turns "file@byte" into "file:line" for places that come in the order of the files.

    A file is read once, up to its last place. After LINE_BYTES places stay as they are: to tell the line of a place in
    terabytes would be to read them again.
    """

    def __init__(self) -> None:
        self._path, self._offset, self._line = "", 0, 1
        self._left = LINE_BYTES

    def tell(self, where: str) -> str:
        found = re.fullmatch(r"(.+)@(\d+)", where, re.DOTALL)
        if found is None or not os.path.isfile(found[1]):
            return where
        path, offset = found[1], int(found[2])
        if path != self._path or offset < self._offset:
            self._path, self._offset, self._line = path, 0, 1
        if offset - self._offset > self._left:
            return where
        with open(path, "rb") as file:
            file.seek(self._offset)
            while self._offset < offset and (block := file.read(min(1 << 20, offset - self._offset))):
                self._line += block.count(b"\n")
                self._offset += len(block)
                self._left -= len(block)
        return f"{path}:{self._line}"
