"""Keys of many documents on disk, in sorted runs that are read again one range of keys at a time.

This is what bounds the memory of deduplication: writers sort some million keys at a time; readers ask for a range of
keys so narrow that what all runs hold of it fits in memory.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

RUN_RECORDS = 1 << 22
# `check` is the second half of a 128-bit key; `document` counts from the first of the unit that wrote the run.
EXACT = np.dtype([("key", "<u8"), ("check", "<u8"), ("document", "<u4")])
NEAR = np.dtype([("key", "<u8"), ("document", "<u4")])


class Run(NamedTuple):
    """A file of records sorted by key, and by document where keys are equal."""

    path: Path
    records: int


class RunWriter:
    """Records in any number of runs `PREFIX-000.run`, `PREFIX-001.run`, ... in `folder`."""

    def __init__(self, folder: Path, prefix: str, dtype: np.dtype) -> None:
        self.runs: list[Run] = []
        self._folder = folder
        self._prefix = prefix
        self._dtype = dtype
        self._waiting: list[np.ndarray] = []
        self._count = 0

    def add(self, documents: np.ndarray, **columns: np.ndarray) -> None:
        """Records in ascending order of documents, over all calls."""
        records = np.empty(len(documents), self._dtype)
        records["document"] = documents
        for name, values in columns.items():
            records[name] = values
        self._waiting.append(records)
        self._count += len(records)
        if self._count >= RUN_RECORDS:
            self.finish()

    def finish(self) -> list[Run]:
        """Writes what waits; all runs so far."""
        if self._count:
            records = np.concatenate(self._waiting)
            records = records[np.argsort(records["key"], kind="stable")]
            run = Run(self._folder / f"{self._prefix}-{len(self.runs):03d}.run", len(records))
            records.tofile(run.path)
            self.runs.append(run)
            self._waiting, self._count = [], 0
        return self.runs


def num_partitions(runs: Sequence[tuple[int, Run]], most_records: int) -> int:
    """So many ranges that each holds about half of `most_records`, and few hold more than all of them."""
    return max(1, -(-2 * sum(run.records for _, run in runs) // most_records))


def read_partition(
    runs: Sequence[tuple[int, Run]], dtype: np.dtype, *, number: int, of: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The records with a key in the range `number` of `of` equal ranges of 64-bit numbers, one run after another.

    `runs` are (first document of its unit, run), in the order of documents. Comes as (records, documents): int64
    numbers over all units.
    """
    low, high = (-(-(i << 64) // of) for i in (number, number + 1))
    for first, run in runs:
        keys = np.memmap(run.path, dtype, mode="r", shape=run.records)["key"]
        start = bisect_left(keys, low)
        stop = bisect_left(keys, high) if high < 1 << 64 else run.records
        del keys  # and with it the mapping: pages that are mapped count as memory of this process
        records = np.fromfile(run.path, dtype, count=stop - start, offset=start * dtype.itemsize)
        yield records, records["document"].astype(np.int64) + first
