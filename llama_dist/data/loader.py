"""This rank's micro-batches of a step, as a function of the samples consumed: there is no other data state."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llama_dist.config import DataConfig
from llama_dist.data.order import sample_at, shares_of
from llama_dist.data.shards import Shards
from llama_dist.data.tokenizer import Tokenizer, fingerprint_of, load_tokenizer
from llama_dist.errors import UserError


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

    A sample is `seq_len + 1` tokens; sample i of a source begins at token i * seq_len, so its last token is the first
    of the next. Step by step, the samples in the order of the ranks are the same for any `dp` and `micro_batch`.
    Raises UserError where shards and tokenizer, vocabulary or length do not go together.
    """

    def __init__(
        self, data: DataConfig, *, vocab_size: int, global_batch: int, micro_batch: int, dp: int, dp_rank: int
    ) -> None:
        if global_batch % (dp * micro_batch):
            raise UserError(
                f"train.global_batch={global_batch} does not split into dp={dp} times micro_batch={micro_batch}; "
                f"use a multiple of {dp * micro_batch}"
            )
        assert 0 <= dp_rank < dp, f"dp_rank {dp_rank} of dp {dp}"
        self._weights = [source.weight for source in data.train]
        shares_of(self._weights)  # says now, not at the first step, which weight is wrong
        fingerprint = fingerprint_of(data.tokenizer)
        self._sources = [
            open_shards(source.shards, tokenizer=data.tokenizer, fingerprint=fingerprint, vocab_size=vocab_size)
            for source in data.train
        ]
        self.num_samples = [num_samples(shards, seq_len=data.seq_len) for shards in self._sources]
        # Only boundaries need the tokenizer itself.
        self._tokenizer: Tokenizer | None = load_tokenizer(data.tokenizer) if data.document_mask else None
        self._seq_len = data.seq_len
        self._vocab_size = vocab_size
        self._seed = data.seed
        self._micro_batch = micro_batch
        self._share = global_batch // dp
        self._offset = dp_rank * self._share

    @property
    def fingerprint(self) -> str:
        """A hash of what decides the samples: each source's shard files (not where they lie) and weight."""
        digest = hashlib.sha256()
        for shards, weight in zip(self._sources, self._weights, strict=True):
            files = shards.manifest.files if shards.manifest else shards.sample_checksums()
            digest.update(json.dumps([files, weight], sort_keys=True).encode())
        return digest.hexdigest()

    def microbatches(self, samples_consumed: int) -> list[Batch]:
        """The micro-batches of the step after `samples_consumed` samples."""
        first = samples_consumed + self._offset
        positions = np.arange(first, first + self._share, dtype=np.int64)
        source, sample = sample_at(positions, sizes=self.num_samples, weights=self._weights, seed=self._seed)
        rows = [self._read(int(s), int(i)) for s, i in zip(source, sample, strict=True)]
        return [self._batch(tokens) for tokens in torch.from_numpy(np.stack(rows)).split(self._micro_batch)]

    def _batch(self, tokens: Tensor) -> Batch:
        if self._tokenizer is None:
            return Batch(tokens)
        return Batch(tokens, document_starts(tokens, bos_id=self._tokenizer.bos_id, eos_id=self._tokenizer.eos_id))

    def _read(self, source: int, sample: int) -> np.ndarray:
        start, shards = sample * self._seq_len, self._sources[source]
        row = shards.tokens(start, start + self._seq_len + 1).astype(np.int64)
        if row.max() >= self._vocab_size:
            raise UserError(
                f"{shards.path}: tokens {start} to {start + self._seq_len} hold the id {row.max()}, and "
                f"model.vocab_size is {self._vocab_size}; the shards are damaged, or are another tokenizer's"
            )
        return row


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


def num_samples(shards: Shards, *, seq_len: int) -> int:
    """How many samples the tokens make. Raises UserError where it is none."""
    if shards.num_tokens <= seq_len:
        raise UserError(
            f"{shards.path}: {shards.num_tokens} tokens are fewer than the {seq_len + 1} of one sample "
            f"(data.seq_len={seq_len}, and one to predict); lower data.seq_len or give more text"
        )
    return (shards.num_tokens - 1) // seq_len


def open_shards(path: str, *, tokenizer: str, fingerprint: str, vocab_size: int) -> Shards:
    """Open shards that a model of `vocab_size` can be trained or evaluated on with the tokenizer of `fingerprint`.

    A bare Megatron pair does not say what made it, and is taken as it is.
    """
    shards = Shards(path)
    if shards.manifest is None:
        return shards
    made_by = shards.manifest.tokenizer
    if made_by["fingerprint"] != fingerprint:
        raise UserError(
            f"{path}: was made with another tokenizer: {made_by['file']} (sha256 {made_by['fingerprint'][:12]}), while "
            f"data.tokenizer={tokenizer} (sha256 {fingerprint[:12]}); set data.tokenizer to that one or prepare again"
        )
    if made_by["vocab_size"] > vocab_size:
        raise UserError(
            f"model.vocab_size={vocab_size}: the tokens of {path} go up to {made_by['vocab_size'] - 1}; "
            f"use at least {made_by['vocab_size']}"
        )
    return shards
