"""Contamination: which texts share a run of words with held-out ones, and which held-out texts are hit by it.

A run is 13 words in a row, lower case and without punctuation, as for GPT-3 (Brown et al. 2020, appendix C). Of a
held-out text of 8 to 12 words the run is the whole text; a shorter one would match by chance, so it is not looked
for, and counted. One run in common is enough by default. (GPT-3 cuts out the run and 200 characters around it; here
the whole document goes, so that what is trained on is what was written.)

The runs of the held-out texts are the only thing held: a sorted table in a file that all workers map, 8 bytes a word.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llama_dist.data.clean.words import WordHasher, runs_of_lengths, runs_of_words
from llama_dist.data.documents import Document
from llama_dist.errors import UserError

RUN_WORDS = 13
SHORTEST_RUN = 8
MOST_WORDS = 1 << 26  # of all held-out texts, about 350 MB of text: at 2 GB while the table is sorted
_NONE = 2**64 - 1
_FILTER_BITS = 26  # at most 64 MiB in each worker
_BLOCK = 1 << 20
_NO_ROWS = np.empty(0, np.int64)


class Held(NamedTuple):
    """A held-out text that shares runs with the inputs: `shared` of its `runs`, and a document where the first is."""

    id: str
    runs: int
    shared: int
    found_in: str


@dataclass(frozen=True)
class HeldOut:
    """The held-out texts: ids, which runs each has (those of text i are `runs[first[i]:first[i + 1]]`), the table."""

    ids: list[str]
    runs: np.ndarray
    first: np.ndarray
    too_short: int
    table: Path

    def hits(self, units: Sequence[Path]) -> Iterator[Held]:
        """The held-out texts that share a run with the inputs, from what `RunFinder.save` wrote for each unit."""
        found = np.full(_rows_of(self.table), _NONE, np.uint64)  # run -> unit and number of its first document
        names = [path.with_suffix(".json") for path in units]
        for unit, path in enumerate(units):
            records = np.load(path)
            new = found[records[0]] == _NONE
            found[records[0][new]] = (unit << 32) + records[1][new]
        for i, name in enumerate(self.ids):
            runs = self.runs[self.first[i] : self.first[i + 1]]
            shared = found[runs] != _NONE
            if shared.any():
                unit, document = divmod(int(found[runs].min()), 1 << 32)
                yield Held(name, len(runs), int(shared.sum()), json.loads(names[unit].read_text("utf-8"))[document])


def index_held_out(documents: Iterable[Document], folder: Path, *, run_words: int = RUN_WORDS) -> HeldOut:
    """Writes the table of the runs of `documents` to `folder`. Raises UserError for more words than MOST_WORDS."""
    hasher = WordHasher()
    ids: list[str] = []
    runs: list[np.ndarray] = []
    lengths: set[int] = set()
    too_short = words_so_far = 0
    for document in documents:
        words = hasher(document.text)
        length = min(run_words, len(words))
        if length < min(SHORTEST_RUN, run_words):
            too_short += 1
            continue
        words_so_far += len(words)
        if words_so_far > MOST_WORDS:
            raise UserError(
                f"against: the held-out texts have more than {MOST_WORDS:,} words, which is more than is held in "
                "memory; give a part of them at a time"
            )
        ids.append(document.id)
        runs.append(np.unique(runs_of_words(words, length)))
        lengths.add(length)
    table, places = np.unique(np.concatenate([np.empty(0, np.uint64), *runs]), return_inverse=True)
    np.save(folder / "held-out.npy", table)
    np.save(folder / "held-out-lengths.npy", np.array(sorted(lengths), np.int64))
    first = np.concatenate([[0], np.cumsum([len(part) for part in runs], dtype=np.int64)]).astype(np.int64)
    return HeldOut(ids, places, first, too_short, folder / "held-out.npy")


def _first_bits(table: np.ndarray) -> tuple[np.ndarray, np.uint64]:
    """Which first bits the table's runs have, of as many bits as leave most other runs out, and the shift to get them.

    A look there spares most runs the search in the table.
    """
    bits = min(_FILTER_BITS, max(1, len(table).bit_length() + 4))
    shift = np.uint64(64 - bits)
    found = np.zeros(1 << bits, bool)
    for start in range(0, len(table), _BLOCK):
        found[table[start : start + _BLOCK] >> shift] = True
    return found, shift


def _rows_of(table: Path) -> int:
    return len(np.load(table, mmap_mode="r"))


class RunFinder:
    """Looks for the runs of the held-out texts in the documents of one unit."""

    def __init__(self, table: Path) -> None:
        self._table = np.asarray(np.load(table, mmap_mode="r"))  # mapped: all workers share its pages
        self._lengths: list[int] = np.load(table.with_name("held-out-lengths.npy")).tolist()
        self._filter, self._shift = _first_bits(self._table)
        self._seen: set[int] = set()
        self._ids: list[str] = []
        self._hits: list[tuple[np.ndarray, int]] = []

    def __call__(self, words: np.ndarray, where: str) -> int:
        """How many different runs of the held-out texts are in a document, given by the hashes of its words."""
        found = [self._rows(runs) for runs in runs_of_lengths(words, self._lengths)]
        rows = np.unique(np.concatenate(found)) if found else np.empty(0, np.int64)
        new = [row for row in rows.tolist() if row not in self._seen]
        if new:
            self._seen.update(new)
            self._hits.append((np.array(new, np.int64), len(self._ids)))
            self._ids.append(where)
        return len(rows)

    def _rows(self, runs: np.ndarray) -> np.ndarray:
        runs = runs[self._filter[runs >> self._shift]]
        if not len(runs):
            return _NO_ROWS
        places = np.minimum(np.searchsorted(self._table, runs), len(self._table) - 1)
        return places[self._table[places] == runs]

    def save(self, path: Path) -> None:
        """PATH (.npy): rows of the table that were found, and the number of the first document with each; its ids
        beside it as .json."""
        rows = np.concatenate([np.empty(0, np.int64), *(rows for rows, _ in self._hits)])
        documents = np.repeat([number for _, number in self._hits], [len(rows) for rows, _ in self._hits])
        np.save(path, np.stack([rows, documents.astype(np.int64)]))
        path.with_suffix(".json").write_text(json.dumps(self._ids), "utf-8")
