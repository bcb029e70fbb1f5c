"""What cleaning did: documents and bytes that came in, that each rule took, and that went out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from llama_dist.data.words import counted

EXAMPLES = 3


@dataclass
class Tally:
    """Documents under one rule: how many, their UTF-8 bytes, the ids of the first."""

    documents: int = 0
    bytes: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, size: int, example: str, count: int = 1) -> None:
        self.documents += count
        self.bytes += size
        if len(self.examples) < EXAMPLES:
            self.examples.append(example)

    def merge(self, other: Tally) -> None:
        self.documents += other.documents
        self.bytes += other.bytes
        self.examples = (self.examples + other.examples)[:EXAMPLES]


@dataclass
class Counts:
    """Of one unit, or of everything. `removed` by reason; `changed`: documents that lost lines, and the bytes of these;
    `lines`: those lines by rule, of documents that were kept or removed later."""

    came: Tally = field(default_factory=Tally)
    kept: Tally = field(default_factory=Tally)
    changed: Tally = field(default_factory=Tally)
    removed: dict[str, Tally] = field(default_factory=dict)
    lines: Counter[str] = field(default_factory=Counter)

    def tallies(self) -> list[Tally]:
        return [self.came, self.kept, self.changed, *self.removed.values()]

    def remove(self, reason: str, size: int, example: str, count: int = 1) -> None:
        self.removed.setdefault(reason, Tally()).add(size, example, count)

    def merge(self, other: Counts) -> None:
        self.came.merge(other.came)
        self.kept.merge(other.kept)
        self.changed.merge(other.changed)
        for reason, tally in other.removed.items():
            self.removed.setdefault(reason, Tally()).merge(tally)
        self.lines.update(other.lines)


@dataclass
class Report:
    """What `report.json` holds. `held_out` is about --against: texts, those too short to look for, those that were hit,
    and the most hit of them; `near_not_compared`: see duplicates.py."""

    command: str
    report_only: bool
    settings: dict[str, Any]
    counts: Counts
    near_not_compared: int = 0
    held_out: dict[str, Any] | None = None
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> str:
        values = asdict(self)
        counts = values.pop("counts")
        values["in"] = {"documents": self.counts.came.documents, "bytes": self.counts.came.bytes}
        values["out"] = {"documents": self.counts.kept.documents, "bytes": self.counts.kept.bytes}
        values["removed"] = dict(sorted(counts["removed"].items()))
        values["changed"] = counts["changed"]
        values["lines_removed"] = dict(sorted(self.counts.lines.items()))
        return json.dumps(values, indent=1, ensure_ascii=False) + "\n"

    def lines(self) -> Iterable[str]:
        """The report for people."""
        counts = self.counts
        yield _row("", "documents", "bytes", "")
        yield _row("in", counts.came.documents, counts.came.bytes, "")
        for reason, tally in sorted(counts.removed.items(), key=lambda item: -item[1].documents):
            yield _row(f"  - {reason}", tally.documents, tally.bytes, _examples(tally))
        if counts.changed.documents:
            yield _row("  - lines of others", "", counts.changed.bytes, _examples(counts.changed))
        yield _row("out" if not self.report_only else "would be out", counts.kept.documents, counts.kept.bytes, "")
        if counts.changed.documents:
            removed = ", ".join(f"{rule} {count:,}" for rule, count in counts.lines.most_common())
            changed = counted(counts.changed.documents, "document")
            yield f"{changed} changed by lines that were taken out: {removed}"
        if self.near_not_compared:
            yield (
                f"near duplicates: {self.near_not_compared:,} times a document in a crowded band was like none of the "
                "first texts there and was not compared further; it may have a duplicate that was not found"
            )
        yield from self._held_out_lines()

    def _held_out_lines(self) -> Iterable[str]:
        found = self.held_out
        if found is None:
            return
        yield (
            f"held out: {found['hit']:,} of {counted(found['documents'], 'text')} share {found['run_words']} words in a "
            "row with the inputs, or are in them whole where they are shorter "
            f"({found['too_short']:,} are too short to tell)"
        )
        for item in found["most_hit"]:
            yield f"  {item['shared']:,} of {counted(item['runs'], 'run')} of {item['id']}, first in {item['found_in']}"


def _examples(tally: Tally) -> str:
    return f"for example {tally.examples[0]}" if tally.examples else ""


def _row(name: str, documents: int | str, size: int | str, rest: str) -> str:
    numbers = (f"{value:,}" if isinstance(value, int) else value for value in (documents, size))
    return f"{name:<36} {next(numbers):>13} {next(numbers):>17}  {rest}".rstrip()
