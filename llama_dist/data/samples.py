"""What the loader asks of a source: samples by number, whatever they are cut from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Rows:
    """Some samples: `tokens` (n, seq_len + 1) in the stored type.

    `documents`: for each sample the positions in tokens[:, :-1] at which a document begins, rising, the first always 0;
    None where only the tokens themselves tell. `counted`: bool (n, seq_len), False where a target does not count in the
    loss; None: all count.
    """

    tokens: np.ndarray
    documents: tuple[tuple[int, ...], ...] | None = None
    counted: np.ndarray | None = None


@dataclass(frozen=True)
class Span:
    """Tokens [start, stop) of a document, counted from its first token (the bos)."""

    document: int
    start: int
    stop: int


class Samples(Protocol):
    """The samples of one source.

    `size` is their number in an epoch, None while that is not known (a stream before its end).
    """

    size: int | None

    def at(self, own: np.ndarray, *, seed: int, number: int) -> np.ndarray:
        """Which sample stands at each of the source's own positions: int64, same shape; no sample twice in an epoch.

        `number` is the source's in the run, so that equal sources have orders of their own.
        """
        ...

    def rows(self, samples: np.ndarray) -> Rows:
        """Read samples, in this order."""
        ...

    def prefetch(self, samples: np.ndarray) -> None:
        """Have samples ready soon; only a hint."""
        ...

    def spans(self, sample: int) -> list[Span]:
        """What a sample is made of, in order."""
        ...
