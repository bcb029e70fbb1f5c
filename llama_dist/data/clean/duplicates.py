"""Finding duplicates among any number of documents in bounded memory: ranges of keys, groups, clusters.

Documents with equal keys are a group. In an exact one all are the same as the first. In a near one (a shared band of
MinHash signatures) each is compared with the group's leaders, in order: it joins the first that is similar enough, or
becomes a leader itself. That is a function of the group alone, so neither the number of workers nor the cuts that
keep the memory bounded change the result; and it is linear in the group, where all pairs would be quadratic. A text
that is like none of the first LEADERS is not compared further in this group; such are counted, and the report says it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llama_dist.data.clean.clusters import EXACT_DUPLICATE, Clusters
from llama_dist.data.clean.minhash import PLACES, estimated_similarity
from llama_dist.data.clean.runs import EXACT, NEAR, Run, num_partitions, read_partition

MOST_RECORDS = 1 << 22  # in memory at a time: 24 bytes each, and some times that while they are sorted
LEADERS = 16
_PAIRS = 1 << 15  # compared at a time: two signatures of 480 bytes each


@dataclass
class Signatures:
    """The signatures of all documents, in one file a unit: (number of the unit's first document, file)."""

    files: Sequence[tuple[int, Path]]

    def __post_init__(self) -> None:
        self._firsts = np.array([first for first, _ in self.files], np.int64)

    def of(self, documents: np.ndarray) -> np.ndarray:
        """(documents, PLACES) uint32."""
        wanted, places = np.unique(documents, return_inverse=True)
        rows = np.empty((len(wanted), PLACES), np.uint32)
        units = np.searchsorted(self._firsts, wanted, side="right") - 1
        for unit in np.unique(units).tolist():
            first, path = self.files[unit]
            table = np.memmap(path, np.uint32, mode="r").reshape(-1, PLACES)
            rows[units == unit] = table[wanted[units == unit] - first]
        return rows[places]


class _Records(NamedTuple):
    """Columns, in ascending order of documents where keys are equal."""

    key: np.ndarray
    check: np.ndarray | None
    document: np.ndarray

    def at(self, chosen: np.ndarray) -> _Records:
        return _Records(*(column if column is None else column[chosen] for column in self))


def find_exact(runs: Sequence[tuple[int, Run]], clusters: Clusters) -> None:
    """Joins all documents with the same 128-bit hash, and marks all but the first of each as exact duplicates."""

    def settle(records: _Records) -> _Records:
        assert records.check is not None, "exact records have a second half of their key"
        records = records.at(np.lexsort((records.check, records.key)))
        starts = _starts(records.key) | _starts(records.check)
        firsts = records.document[np.maximum.accumulate(np.where(starts, np.arange(len(starts)), 0))]
        clusters.join(records.document[~starts], firsts[~starts])
        clusters.kind[records.document[~starts]] = EXACT_DUPLICATE
        return records.at(starts)

    _each_partition(runs, EXACT, clusters, settle)


def find_near(
    runs: Sequence[tuple[int, Run]], clusters: Clusters, signatures: Signatures, *, similarity: float
) -> int:
    """Joins documents of an estimated `similarity` at least. Returns how often one was like none of LEADERS.

    Exact duplicates that are marked already are passed over.
    """
    left_out = 0

    def settle(records: _Records) -> _Records:
        nonlocal left_out
        records = records.at(np.argsort(records.key, kind="stable"))
        starts = _starts(records.key)
        leading = np.zeros(len(starts), bool)
        group = np.cumsum(starts) - 1
        active = np.arange(len(starts))
        for _ in range(LEADERS):
            if not len(active):
                break
            leads = _starts(group[active])
            leaders = active[np.maximum.accumulate(np.where(leads, np.arange(len(leads)), 0))]
            leading[active[leads]] = True
            active, leaders = active[~leads], leaders[~leads]
            alike = _alike(records.document[active], records.document[leaders], signatures, similarity)
            clusters.join(records.document[active[alike]], records.document[leaders[alike]])
            active = active[~alike]
        left_out += len(active)
        return records.at(leading)

    _each_partition(runs, NEAR, clusters, settle)
    return left_out


def _alike(documents: np.ndarray, others: np.ndarray, signatures: Signatures, similarity: float) -> np.ndarray:
    alike = np.empty(len(documents), bool)
    for start in range(0, len(documents), _PAIRS):
        block = slice(start, start + _PAIRS)
        alike[block] = estimated_similarity(signatures.of(documents[block]), signatures.of(others[block])) >= similarity
    return alike


def _each_partition(
    runs: Sequence[tuple[int, Run]], dtype: np.dtype, clusters: Clusters, settle: Callable[[_Records], _Records]
) -> None:
    """`settle` for each range of keys; it returns those records that later ones have still to be compared with.

    A range is settled early, and more than once, where one key is so frequent that the range is over the bound.
    """
    parts = num_partitions(runs, MOST_RECORDS)
    for number in range(parts):
        held: list[_Records] = []
        for records, documents in read_partition(runs, dtype, number=number, of=parts):
            new = _Records(records["key"], records["check"] if dtype is EXACT else None, documents)
            held.append(new.at(clusters.kind[documents] != EXACT_DUPLICATE))
            if sum(len(part.key) for part in held) > MOST_RECORDS:
                held = [settle(_joined(held))]
        if held:
            settle(_joined(held))


def _joined(parts: list[_Records]) -> _Records:
    key, check, document = zip(*parts, strict=True)
    return _Records(np.concatenate(key), None if check[0] is None else np.concatenate(check), np.concatenate(document))


def _starts(values: np.ndarray) -> np.ndarray:
    """Where a value differs from the one before it."""
    return np.concatenate([[True], values[1:] != values[:-1]])[: len(values)]
