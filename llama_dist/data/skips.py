"""How much of the inputs may be skipped, and where it was."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from llama_dist.data.documents import with_line
from llama_dist.data.rows import shortened
from llama_dist.data.units import EMPTY, MERGED, SKIPPED, Record, Unit, finished, load_record
from llama_dist.data.words import counted
from llama_dist.errors import UserError
from llama_dist.files import HashingFile

TOLD = 3
MAX_WHY = 160  # characters
HOPELESS = 4  # the documents that are to come may be this many times as dense as those so far
LINE_BYTES = 4 << 30  # that are read, at most, to tell the lines of what was skipped


class SkipLimit:
    """How many documents may be skipped: "20", or "0.1%" of those that there are."""

    def __init__(self, text: str) -> None:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)%|(\d+)", text.strip())
        if not found or (found[1] and Fraction(found[1]) > 100):
            raise UserError(
                f"max_skipped={text!r}: must be a number of documents such as 0, or a share of them such as 0.1%"
            )
        self.text = text.strip()
        self._share = Fraction(found[1]) / 100 if found[1] else None
        self._count = int(found[2] or 0)

    def allows(self, skipped: int, documents: Fraction | int) -> bool:
        return skipped <= (self._count if self._share is None else self._share * documents)


class Tally:
    """The records of finished units, in the order of the units, as far as there is no gap.

    `advance` takes up what has been finished since and raises UserError where too much was skipped. It is judged after
    each unit, as if those to come had four times as many documents for their bytes, and after the last on what there
    is: so the verdict is a function of the inputs, whoever did what and when. The list of what was skipped until then
    is kept in the file `kept`.
    """

    def __init__(self, folder: Path, units: list[Unit], limit: SkipLimit, kept: Path) -> None:
        self.records: list[Record] = []
        self.documents = 0
        self.skipped: Counter[str] = Counter()
        self._folder, self._units, self._limit, self._kept = folder, units, limit, kept
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
            keep_list(self._kept, list_skipped(self._folder, self._units[: len(self.records)]))
            done = f"the first {self._bytes / max(1, self._all_bytes):.1%} of the inputs"
            problem = too_many(
                self._first,
                self.faults,
                f"{counted(seen, 'document')}{'' if is_last else f' in {done}'}",
                self.skipped,
                self._limit.text,
            )
            raise UserError(f"{problem}; {self._kept} lists them; mend them, or raise --max-skipped")


def too_many(first: Sequence[Sequence[str]], faults: int, seen: str, kinds: Mapping[str, int], allowed: str) -> str:
    """That more was skipped than is allowed: how much of what was `seen`, what is wrong with it, and where it begins.

    `first` are [where, why] of the first of them.
    """
    (where, why), *others = first
    also = f"; then {', '.join(with_line(where) for where, _ in others)}" if others else ""
    told = ", ".join(f"{n:,} {kind}" for kind, n in sorted(kinds.items()) if kind != EMPTY)
    return (
        f"{with_line(where)}: {shortened(why, MAX_WHY)}{also} (so {faults:,} of {seen} had to be skipped: {told}; "
        f"allowed are {allowed})"
    )


def list_skipped(folder: Path, units: Iterable[Unit]) -> list[str]:
    """What was skipped in some units, a line of JSON each, by file and line."""
    return list(lines_of(json.loads(line) for unit in units for line in _skipped_lines(folder, unit)))


def lines_of(items: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Items of such a list as lines of JSON, by file and line; they come in the order of the files."""
    numbers = LineNumbers()
    for item in items:
        if "where" in item:
            item["where"] = numbers.tell(item["where"])
        yield json.dumps(item, ensure_ascii=False)


def list_beside(out: Path) -> Path:
    """Where the list of what was skipped is kept when so much was that there is no `out`."""
    return out.with_name(f"{out.name}.{SKIPPED}")


def keep_list(path: Path, lines: Iterable[str]) -> None:
    """Write such a list, in place of an older one; another process may be at it, too."""
    work = path.with_name(f"{path.name}.partial-{os.getpid()}")
    write_lines(work, lines)
    os.replace(work, path)


def write_lines(path: Path, lines: Iterable[str]) -> HashingFile:
    """A new file of some lines."""
    path.unlink(missing_ok=True)
    with HashingFile(path) as file:
        for line in lines:
            file.write(f"{line}\n".encode(errors="backslashreplace"))
    return file


def _skipped_lines(folder: Path, unit: Unit) -> Iterator[str]:
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
