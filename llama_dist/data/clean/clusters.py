"""Which documents are the same: a union-find over document numbers, kept in files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

_BLOCK = 1 << 20  # documents looked at at a time
KEPT, EXACT_DUPLICATE, NEAR_DUPLICATE = range(3)


class Clusters:
    """Documents 0 .. count - 1, each in a cluster whose first document stands for it.

    Two files, `clusters.parent` (int64) and `clusters.kind` (uint8), are mapped: what does not fit in memory is on
    the disk, and workers read the result there.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.parent = np.memmap(folder / "clusters.parent", np.int64, mode="w+", shape=max(1, count))
        self.kind = np.memmap(folder / "clusters.kind", np.uint8, mode="w+", shape=max(1, count))
        self.count = count
        for start in range(0, count, _BLOCK):
            stop = min(count, start + _BLOCK)
            self.parent[start:stop] = np.arange(start, stop)

    def join(self, documents: np.ndarray, others: np.ndarray) -> None:
        """Each of `documents` is the same as the one of `others` at its place."""
        for one, other in zip(documents.tolist(), others.tolist(), strict=True):
            one, other = self._root(one), self._root(other)
            if one != other:
                self.parent[max(one, other)] = min(one, other)  # so that a root is the first of its cluster

    def _root(self, document: int) -> int:
        while (above := int(self.parent[document])) != document:
            self.parent[document] = document = int(self.parent[above])
        return document

    def settle(self) -> None:
        """From here on `parent` is the first document of each one's cluster, and `kind` why one is left out."""
        for start in range(0, self.count, _BLOCK):
            block = self.parent[start : min(self.count, start + _BLOCK)]
            # A parent comes before its child, so those of earlier blocks are roots by now.
            while (above := self.parent[block] != block).any():
                block[above] = self.parent[block[above]]
            kind = self.kind[start : start + len(block)]
            kind[(block != np.arange(start, start + len(block))) & (kind == KEPT)] = NEAR_DUPLICATE
        self.parent.flush()
        self.kind.flush()


def read_clusters(folder: Path, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(`parent`, `kind`) of the settled clusters, for `count` documents from `first` on."""
    parent = np.fromfile(folder / "clusters.parent", np.int64, count, offset=8 * first)
    return parent, np.fromfile(folder / "clusters.kind", np.uint8, count, offset=first)
