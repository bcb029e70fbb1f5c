"""What the loader asks of a source: samples by number, whatever they are cut from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from llama_dist.data.order import shuffled
from llama_dist.data.shards import Shards
from llama_dist.errors import UserError


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
        """What a sample is made of, in order: all of its seq_len + 1 tokens but padding."""
        ...


class Concatenated:
    """Samples cut from the documents one after another: sample i is tokens [i * seq_len, (i + 1) * seq_len].

    So the last token of a sample is the first of the next, and a short rest at the end is left out. Each epoch has an
    order of its own. Raises UserError where the tokens do not make one sample.
    """

    def __init__(self, shards: Shards, seq_len: int) -> None:
        if shards.num_tokens <= seq_len:
            raise UserError(
                f"{shards.path}: {shards.num_tokens} tokens are fewer than the {seq_len + 1} of one sample "
                f"(data.seq_len={seq_len}, and one to predict); lower data.seq_len or give more text"
            )
        self._shards = shards
        self.size: int = (shards.num_tokens - 1) // seq_len
        self._seq_len = seq_len

    def at(self, own: np.ndarray, *, seed: int, number: int) -> np.ndarray:
        return shuffled(own, self.size, seed=seed, number=number)

    def rows(self, samples: np.ndarray) -> Rows:
        return Rows(self._shards.rows(samples * self._seq_len, self._seq_len + 1))

    def prefetch(self, samples: np.ndarray) -> None:
        self._shards.prefetch(samples * self._seq_len, self._seq_len + 1)

    def spans(self, sample: int) -> list[Span]:
        token, end = sample * self._seq_len, (sample + 1) * self._seq_len + 1
        document, _ = self._shards.document_at(token)
        found = []
        while token < end:
            start, stop = self._shards.document_span(document)
            if stop > token:  # an empty document has no tokens to show
                found.append(Span(document, token - start, min(stop, end) - start))
                token = stop
            document += 1
        return found
