"""What worker processes do with one unit of the inputs: look at each document by itself, and later write those to keep.

Everything that the second half needs of the first is in files of the work folder, named by the number of the unit:
the documents kept so far, their ids, sizes and signatures, and runs of keys.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_dist.data.clean.clusters import EXACT_DUPLICATE, KEPT, read_clusters
from llama_dist.data.clean.filters import FilterChoice, Filters
from llama_dist.data.clean.jsonl import JsonlWriter, read_lines
from llama_dist.data.clean.minhash import bands_of, signature_of
from llama_dist.data.clean.names import NamesWriter, names_of, sizes_of
from llama_dist.data.clean.overlap import RunFinder
from llama_dist.data.clean.report import Counts
from llama_dist.data.clean.runs import EXACT, NEAR, Run, RunWriter
from llama_dist.data.clean.words import WordHasher, content_hash
from llama_dist.data.documents import Document, Reading, Skipped, read_part
from llama_dist.data.units import Unit

REMOVED_TEXT = "removed_text"  # not "text", so that nobody trains on the list of what was removed
UNREADABLE = "unreadable."  # and of what kind: the reason of what was removed for that
_BATCH = 1024  # signatures, and hashes of texts, that wait to be written


@dataclass(frozen=True)
class Job:
    """What is the same for all units. `rows`: of a band of signatures (0: near duplicates are not looked for).
    `texts`: whether documents are written, or only judged."""

    folder: Path
    reading: Reading
    filters: list[FilterChoice]
    exact: bool
    rows: int
    held_out: Path | None
    overlap: int
    texts: bool
    removed_texts: bool
    suffix: str

    @property
    def deduplicates(self) -> bool:
        return self.exact or self.rows > 0


@dataclass
class Judged:
    """What became of a unit when each document was looked at by itself."""

    number: int
    counts: Counts = field(default_factory=Counts)
    skipped: int = 0  # of what could not be read; without the empty ones
    exact: list[Run] = field(default_factory=list)
    near: list[Run] = field(default_factory=list)


class Paths(NamedTuple):
    """The files of a unit."""

    kept: Path
    removed: Path
    duplicates: Path
    names: Path
    signatures: Path
    hits: Path


def paths_of(job: Job, number: int) -> Paths:
    kinds = ("kept", "removed", "duplicates", "names", "signatures", "hits")
    ends = (job.suffix, job.suffix, job.suffix, "", "", ".npy")
    return Paths(*(job.folder / f"{kind}-{number:06d}{end}" for kind, end in zip(kinds, ends, strict=True)))


def unreadable_of(job: Job, number: int) -> Iterator[dict[str, str]]:
    """What of a unit, which was judged, cannot be read: where, kind and reason."""
    for line in read_lines(paths_of(job, number).removed):
        item = json.loads(line)
        if item["reason"].startswith(UNREADABLE):
            kind = item["reason"].removeprefix(UNREADABLE)
            yield {"where": item["id"], "kind": kind, "reason": item["why"]}


def judge(job: Job, unit: Unit) -> Judged:
    """Filters and the search for held-out runs on each document, and the keys by which duplicates are found."""
    result, counts, paths = Judged(unit.number), Counts(), paths_of(job, unit.number)
    result.counts = counts
    filters, hasher = Filters(job.filters), WordHasher()
    finder = RunFinder(job.held_out) if job.held_out else None
    with ExitStack() as files:
        removed = _Removed(job, counts, files.enter_context(JsonlWriter(paths.removed)))
        kept = files.enter_context(JsonlWriter(paths.kept)) if job.texts else None
        keys = files.enter_context(_Keys(job, unit.number)) if job.deduplicates else None
        for document in _documents(job, unit, result, removed):
            if not document.text.strip():
                removed.document(document, "empty")
                continue
            rule, text = filters(document.text, document.id)
            if rule is not None or not text:
                removed.document(document, rule or "empty")
                continue
            words = hasher(text) if finder or job.rows else _NO_WORDS
            if finder and (shared := finder(words, document.id)) >= job.overlap:
                removed.document(document, "held_out", runs=shared)
                continue
            size = _size(text)
            counts.kept.add(size, document.id)
            if text != document.text:
                removed.lines_of(document, _size(document.text) - size)
            if kept:
                kept.add({"id": document.id, "text": text})
            if keys:
                keys.add(document.id, size, text, words)
        if keys:
            result.exact, result.near = keys.finish()
    counts.lines = filters.lines
    if finder:
        finder.save(paths.hits)
    return result


_NO_WORDS = np.empty(0, np.uint64)


class _Removed:
    """Counts and lists what was taken out when documents were looked at one by one."""

    def __init__(self, job: Job, counts: Counts, file: JsonlWriter) -> None:
        self._job, self._counts, self._file = job, counts, file

    def document(self, document: Document, reason: str, **more: int) -> None:
        size = _size(document.text)
        self._counts.remove(reason, size, document.id)
        self._list(document, {"reason": reason, "bytes": size, **more})

    def lines_of(self, document: Document, size: int) -> None:
        """The document stays, without some of its lines."""
        self._counts.changed.add(size, document.id)
        self._list(document, {"reason": "lines", "bytes": size, "kept": True})

    def unreadable(self, item: Skipped) -> None:
        reason = "empty" if item.kind == "empty" else f"{UNREADABLE}{item.kind}"
        self._counts.remove(reason, 0, item.where, item.count)
        self._file.add({"id": item.where, "reason": reason, "why": item.reason, "documents": item.count})

    def _list(self, document: Document, entry: dict[str, Any]) -> None:
        text = {REMOVED_TEXT: document.text} if self._job.removed_texts else {}
        self._file.add({"id": document.id, **entry, **text})


def _documents(job: Job, unit: Unit, result: Judged, removed: _Removed) -> Iterator[Document]:
    """The documents of a unit; what cannot be read is listed as removed."""
    for part in unit.parts:
        for item in read_part(part, job.reading):
            if isinstance(item, Document):
                result.counts.came.add(_size(item.text), item.id)
                yield item
            else:
                result.counts.came.add(0, item.where, item.count)
                result.skipped += item.count if item.kind != "empty" else 0
                removed.unreadable(item)


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


class _Keys:
    """Writes the ids, signatures and keys of the documents that were kept."""

    def __init__(self, job: Job, number: int) -> None:
        paths = paths_of(job, number)
        self._job = job
        self._names = NamesWriter(paths.names)
        self._exact = RunWriter(job.folder, f"exact-{number:06d}", EXACT)
        self._near = RunWriter(job.folder, f"near-{number:06d}", NEAR)
        self._table = paths.signatures.open("xb") if job.rows else None
        self._count = 0
        self._hashes: list[tuple[int, int]] = []
        self._signatures: list[np.ndarray] = []
        self._signed: list[bool] = []

    def add(self, name: str, size: int, text: str, words: np.ndarray) -> None:
        self._names.add(name, size)
        if self._job.exact:
            self._hashes.append(content_hash(text))
        if self._job.rows:
            # What has no words, such as a row of dashes, has no signature and is like nothing else.
            self._signatures.append(signature_of(words) if len(words) else _NO_SIGNATURE)
            self._signed.append(len(words) > 0)
        self._count += 1
        if max(len(self._hashes), len(self._signatures)) >= _BATCH:
            self._write()

    def _write(self) -> None:
        if self._hashes:
            documents = np.arange(self._count - len(self._hashes), self._count)
            key, check = np.array(self._hashes, np.uint64).T
            self._exact.add(documents, key=key, check=check)
        if self._signatures and self._table:
            documents = np.arange(self._count - len(self._signatures), self._count)
            signatures, signed = np.stack(self._signatures), np.array(self._signed)
            self._table.write(signatures.data)
            bands = bands_of(signatures[signed], self._job.rows)
            self._near.add(np.repeat(documents[signed], bands.shape[1]), key=bands.ravel())
        self._hashes, self._signatures, self._signed = [], [], []

    def finish(self) -> tuple[list[Run], list[Run]]:
        self._write()
        return self._exact.finish(), self._near.finish()

    def __enter__(self) -> _Keys:
        return self

    def __exit__(self, *error: object) -> None:
        self._names.close()
        if self._table:
            self._table.close()


_NO_SIGNATURE = signature_of(np.zeros(1, np.uint64))


def drop_duplicates(job: Job, number: int, firsts: np.ndarray, out: Path | None) -> Counts:
    """Writes the documents of a unit that stay to `out` (None: writes none), and the list of the others.

    `firsts` are the numbers of the first document of each unit, and of the end. Returns the change of the counts.
    """
    paths, counts = paths_of(job, number), Counts()
    parents, kinds = read_clusters(job.folder, int(firsts[number]), int(firsts[number + 1] - firsts[number]))
    dropped = np.flatnonzero(kinds != KEPT)
    own = names_of(paths.names, dropped)
    sizes = sizes_of(paths.names)
    leaders = _leaders(job, firsts, parents[dropped])
    reasons = ["exact_duplicate" if kinds[i] == EXACT_DUPLICATE else "near_duplicate" for i in dropped]
    entries: dict[int, dict[str, Any]] = {
        int(i): {"id": own[k], "reason": reasons[k], "bytes": int(sizes[i]), "duplicate_of": leaders[k]}
        for k, i in enumerate(dropped)
    }
    for entry in entries.values():
        counts.remove(entry["reason"], entry["bytes"], entry["id"])
        counts.kept.documents -= 1
        counts.kept.bytes -= entry["bytes"]
    with ExitStack() as files:
        removed = files.enter_context(JsonlWriter(paths.duplicates))
        kept = files.enter_context(JsonlWriter(out)) if out else None
        for i, line in enumerate(read_lines(paths.kept) if job.texts else ()):
            if i not in entries:
                if kept:
                    kept.add_line(line)
            elif job.removed_texts:
                removed.add({**entries.pop(i), REMOVED_TEXT: json.loads(line)["text"]})
        for entry in entries.values():
            removed.add(entry)
    return counts


def _leaders(job: Job, firsts: np.ndarray, documents: np.ndarray) -> list[str]:
    """The ids of documents by their numbers over all units."""
    names = [""] * len(documents)
    units = np.searchsorted(firsts, documents, side="right") - 1
    for unit in np.unique(units).tolist():
        places = np.flatnonzero(units == unit)
        found = names_of(paths_of(job, unit).names, documents[places] - firsts[unit])
        for place, name in zip(places.tolist(), found, strict=True):
            names[place] = name
    return names
