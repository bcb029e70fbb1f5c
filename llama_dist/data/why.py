"""Which documents the samples of a run were made of, for any step, past or to come, without training anything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llama_dist.config_data import DataConfig
from llama_dist.data.history import History
from llama_dist.data.mixture import Mixture
from llama_dist.data.sources import OpenSource, open_known
from llama_dist.data.stream import Spools
from llama_dist.errors import UserError


@dataclass(frozen=True)
class Part:
    """Tokens [start, stop) of a document, and the file that they begin in; the document has `size` tokens.

    `origin`: the input that it came from and its id there; None where the shards do not tell (those of other tools).
    """

    file: str
    document: int
    origin: tuple[str, str] | None
    start: int
    stop: int
    size: int


@dataclass(frozen=True)
class Explained:
    """One sample: where it stands in the run, whose it is, and what it is made of.

    `own` is its position among all samples that the run takes of this source, `epoch` counts from 0 (None: the source
    has no end that is known). `tokens`: (seq_len + 1,) in the stored type.
    """

    position: int
    source: str
    sample: int
    own: int
    epoch: int | None
    parts: tuple[Part, ...]
    tokens: np.ndarray


def explain(
    history: History, positions: Sequence[int], data: DataConfig, *, vocab_size: int, spools: Spools | None = None
) -> Iterator[Explained]:
    """What stands at some positions of a run, in order; `data` gives seed, length and tokenizer.

    Raises UserError behind the end of the data, and where a source does not hold any more what the run has read.
    """
    mixture = Mixture(history.phases)
    if mixture.end is not None and max(positions) >= mixture.end:
        raise UserError(f"sample {max(positions)} of the run: the data ends at {mixture.end}")
    numbers, own = mixture.at(np.array(positions, dtype=np.int64))
    sources = {
        n: open_known(history.sources[n], data, vocab_size=vocab_size, spools=spools)
        for n in np.unique(numbers).tolist()
    }
    for position, number, place in zip(positions, numbers.tolist(), own, strict=True):
        source = sources[number]
        sample = source.samples.at(np.array([place]), seed=data.seed, number=number)
        yield Explained(
            position=position,
            source=history.sources[number].name,
            sample=int(sample[0]),
            own=int(place),
            epoch=None if source.samples.size is None else int(place) // source.samples.size,
            parts=tuple(_parts(source, int(sample[0]))),
            tokens=source.samples.rows(sample).tokens[0],
        )


def _parts(source: OpenSource, sample: int) -> Iterator[Part]:
    for span in source.samples.spans(sample):
        start, stop = source.shards.document_span(span.document)
        origin = source.shards.origin(span.document)
        yield Part(source.file_of(span), span.document, origin, span.start, span.stop, stop - start)
