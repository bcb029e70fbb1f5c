"""This rank's micro-batches of a step, as a function of the samples consumed: there is no other data state."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from llama_dist.config_data import DataConfig
from llama_dist.data.history import History, Pace, continue_history
from llama_dist.data.mixture import Mixture
from llama_dist.data.samples import Rows
from llama_dist.data.sources import open_sources
from llama_dist.data.stream import Spools
from llama_dist.data.tokenizer import Tokenizer, load_tokenizer
from llama_dist.errors import UserError

BLOCK = 4096  # samples whose places are looked up at once: numpy takes as long for one as for a hundred


@dataclass(frozen=True)
class Batch:
    """Micro-batch: `tokens` (micro_batch, seq_len + 1) int64, and for each row where documents begin in tokens[:, :-1].

    `documents`: positions in rising order, the first always 0; None where documents see each other.
    `counted`: bool (micro_batch, seq_len), which targets (tokens[:, 1:]) count in the loss; None: all. In a step, either
    all replicas have such masks or none has.
    """

    tokens: Tensor
    documents: tuple[tuple[int, ...], ...] | None = None
    counted: Tensor | None = None


class Loader:
    """Reads the samples of one data-parallel replica.

    A sample is `seq_len + 1` tokens. Step by step, the samples in the order of the ranks are the same for any `dp` and
    `micro_batch`. With `pin` batches lie in pinned memory, from which a GPU copies while it computes. Raises UserError
    where shards and tokenizer, vocabulary or length do not go together.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        vocab_size: int,
        global_batch: int,
        micro_batch: int,
        dp: int,
        dp_rank: int,
        pin: bool = False,
        spools: Spools | None = None,
    ) -> None:
        if global_batch % (dp * micro_batch):
            raise UserError(
                f"train.global_batch={global_batch} does not split into dp={dp} times micro_batch={micro_batch}; "
                f"use a multiple of {dp * micro_batch}"
            )
        assert 0 <= dp_rank < dp, f"dp_rank {dp_rank} of dp {dp}"
        self._data = data
        self._sources = open_sources(data, vocab_size=vocab_size, spools=spools)
        # Only boundaries need the tokenizer itself.
        self._tokenizer: Tokenizer | None = load_tokenizer(data.tokenizer) if data.document_mask else None
        self._masked = data.packing != "concat"
        self._vocab_size = vocab_size
        self.global_batch = global_batch
        self._micro_batch = micro_batch
        self._share = global_batch // dp
        self._offset = dp_rank * self._share
        self._pin = pin
        self.begin()

    @property
    def num_samples(self) -> list[int | None]:
        """Of each source, in an epoch."""
        return [source.samples.size for source in self._sources]

    @property
    def tokens_per_step(self) -> int:
        """Of this replica, as they are computed on."""
        return self._share * self._data.seq_len

    def begin(
        self, history: History | None = None, *, step: int = 0, samples: int = 0, steps: int | None = None
    ) -> History:
        """Take up a run that has made `step` steps of `samples` samples in all; returns its history from now on.

        Raises UserError where a source is another than it was, or where the data ends before `steps` are made.
        """
        history, numbers = continue_history(
            history,
            [opened.present(source) for opened, source in zip(self._sources, self._data.train, strict=True)],
            self._data.curriculum,
            now=Pace(step, samples, self.global_batch),
            steps=steps,
        )
        self._mixture = Mixture(history.phases)
        self._by_number = {n: source.samples for n, source in zip(numbers, self._sources, strict=True)}
        self._names = {n: source.known.name for n, source in zip(numbers, self._sources, strict=True)}
        # Places in a stream are known when its text is there: nothing may ask for them before they are needed.
        self._waits = any(source.samples.size is None for source in self._sources)
        self._block = lru_cache(maxsize=2)(self._places)  # that of the step, and that of the steps looked ahead to
        return history

    def microbatches(self, samples_consumed: int) -> list[Batch]:
        """The micro-batches of the step after `samples_consumed` samples."""
        numbers, samples = self._step(samples_consumed)
        tokens = torch.empty((self._share, self._data.seq_len + 1), dtype=torch.int64, pin_memory=self._pin)
        counted = torch.ones(tokens[:, 1:].shape, dtype=torch.bool, pin_memory=self._pin) if self._masked else None
        documents: list[tuple[int, ...]] = [()] * self._share
        for number, chosen in _by_source(numbers):
            rows = self._read(number, samples[chosen])
            tokens.numpy()[chosen] = rows.tokens
            if counted is not None and rows.counted is not None:
                counted.numpy()[chosen] = rows.counted
            if self._tokenizer is not None:
                bos_id, eos_id = self._tokenizer.bos_id, self._tokenizer.eos_id
                found = rows.documents or document_starts(tokens[chosen], bos_id=bos_id, eos_id=eos_id)
                for i, starts in zip(np.arange(self._share)[chosen].tolist(), found, strict=True):
                    documents[i] = starts
        return [
            Batch(
                tokens[at : at + self._micro_batch],
                None if self._tokenizer is None else tuple(documents[at : at + self._micro_batch]),
                None if counted is None else counted[at : at + self._micro_batch],
            )
            for at in range(0, self._share, self._micro_batch)
        ]

    def prefetch(self, samples_consumed: int) -> None:
        """Have the step after `samples_consumed` samples ready soon; only a hint."""
        if self._waits:
            return
        numbers, samples = self._step(samples_consumed)
        for number, chosen in _by_source(numbers):
            self._by_number[number].prefetch(samples[chosen])

    def _step(self, samples_consumed: int) -> tuple[np.ndarray, np.ndarray]:
        """(number of the source, sample) of each of this replica's samples of a step."""
        step, rest = divmod(samples_consumed, self.global_batch)
        block, row = divmod(step, self._steps_of_block)
        numbers, samples = self._block(rest, block)
        if row >= len(numbers):
            last = samples_consumed + self.global_batch - 1
            raise UserError(f"sample {last} of the run: the data ends at {self._mixture.end}")
        return numbers[row], samples[row]

    @property
    def _steps_of_block(self) -> int:
        return 1 if self._waits else max(1, BLOCK // self._share)

    def _places(self, rest: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """As `_step`, of all steps of a block that the data lasts for: int64 (steps, samples of this replica) each."""
        steps = np.arange(block * self._steps_of_block, (block + 1) * self._steps_of_block, dtype=np.int64)
        firsts = rest + steps * self.global_batch
        if self._mixture.end is not None:
            firsts = firsts[firsts + self.global_batch <= self._mixture.end]
        positions = (firsts + self._offset)[:, None] + np.arange(self._share, dtype=np.int64)
        numbers, own = self._mixture.at(positions)
        samples = np.full_like(own, -1)  # of sources that were taken out before these steps are made
        for number, source in self._by_number.items():
            chosen = numbers == number
            samples[chosen] = source.at(own[chosen], seed=self._data.seed, number=number)
        return numbers, samples

    def _read(self, number: int, samples: np.ndarray) -> Rows:
        rows = self._by_number[number].rows(samples)
        ids = rows.tokens.view(f"u{rows.tokens.itemsize}")  # a negative id is out of range, too
        if ids.max() >= self._vocab_size:
            row = int(np.argmax(ids.max(axis=1)))
            raise UserError(
                f"{self._names[number]}: sample {samples[row]} holds the id {ids[row].max()}, and "
                f"model.vocab_size is {self._vocab_size}; the shards are damaged, or are another tokenizer's"
            )
        return rows


def _by_source(numbers: np.ndarray) -> list[tuple[int, slice | np.ndarray]]:
    """Each source of some samples, and which of them are its."""
    if (numbers == numbers[0]).all():
        return [(int(numbers[0]), slice(None))]
    return [(number, np.flatnonzero(numbers == number)) for number in np.unique(numbers).tolist()]


def document_starts(tokens: Tensor, *, bos_id: int | None, eos_id: int) -> tuple[tuple[int, ...], ...]:
    """For each row of `tokens` (rows, seq_len + 1), the positions in tokens[:, :-1] at which a document begins.

    It begins at a bos, after an eos (shards of other tools may have no bos), and where the row does. The last token is
    only predicted, so nothing begins there.
    """
    inputs = tokens[:, :-1]
    begins = torch.zeros_like(inputs, dtype=torch.bool)
    begins[:, 0] = True
    begins[:, 1:] = inputs[:, :-1] == eos_id
    if bos_id is not None:
        begins |= inputs == bos_id
    return tuple(tuple(row.nonzero().flatten().tolist()) for row in begins)
