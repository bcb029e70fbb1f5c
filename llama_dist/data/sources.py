"""The sources of a config, opened: each kind of source and each way of packing becomes samples by number."""

from __future__ import annotations

from dataclasses import dataclass

from llama_dist.config_data import DataConfig, Source
from llama_dist.data.history import Known, Present
from llama_dist.data.packing import BestFit, identity_of
from llama_dist.data.remote import open_storage
from llama_dist.data.samples import Concatenated, Samples, Span
from llama_dist.data.shards import Shards
from llama_dist.data.tokenizer import fingerprint_of
from llama_dist.errors import UserError


@dataclass(frozen=True)
class OpenSource:
    """A source that can be read. `known.identity` is a hash of its content, wherever that lies."""

    known: Known
    samples: Samples
    shards: Shards

    def present(self, source: Source) -> Present:
        """It, as the config has it."""
        return Present(self.known, source.weight, source.epochs, self.samples.size)

    def file_of(self, span: Span) -> str:
        """The file that a part of a document begins in."""
        return self.shards.pair_of(self.shards.document_span(span.document)[0] + span.start)


def open_sources(data: DataConfig, *, vocab_size: int) -> list[OpenSource]:
    """All of data.train. Raises UserError where shards, tokenizer, vocabulary and length do not go together."""
    fingerprint = fingerprint_of(data.tokenizer)
    return [open_source(source, data, fingerprint=fingerprint, vocab_size=vocab_size) for source in data.train]


def open_source(source: Source, data: DataConfig, *, fingerprint: str, vocab_size: int) -> OpenSource:
    """One source of `data`; `fingerprint` is that of data.tokenizer."""
    shards = open_shards(source.shards, data, fingerprint=fingerprint, vocab_size=vocab_size)
    known = Known(source.name, identity_of(shards), source.model_dump(mode="json"))
    return OpenSource(known, open_samples(shards, data), shards)


def open_samples(shards: Shards, data: DataConfig) -> Samples:
    """Shards cut into samples as data.packing says."""
    kinds = {"concat": Concatenated, "best_fit": BestFit}
    return kinds[data.packing](shards, data.seq_len)


def open_known(known: Known, data: DataConfig, *, vocab_size: int) -> OpenSource:
    """A source that a run has or had, where it was last. Raises UserError where its content is another by now."""
    source = Source(**known.source)
    opened = open_source(source, data, fingerprint=fingerprint_of(data.tokenizer), vocab_size=vocab_size)
    if opened.known.identity != known.identity:
        raise UserError(
            f"{source.shards}: holds something else than when the run read it as {known.name!r} (sha256 "
            f"{known.identity[:12]} then, {opened.known.identity[:12]} now); give back the shards of then"
        )
    return opened


def open_shards(path: str, data: DataConfig, *, fingerprint: str, vocab_size: int) -> Shards:
    """Open shards that a model of `vocab_size` can be trained or evaluated on; `fingerprint` is that of data.tokenizer.

    A bare Megatron pair does not say what made it, and is taken as it is.
    """
    shards = Shards(path, storage=open_storage(path, cache=data.cache, cache_gb=data.cache_gb))
    if shards.manifest is None:
        return shards
    made_by = shards.manifest.tokenizer
    if made_by["fingerprint"] != fingerprint:
        raise UserError(
            f"{path}: was made with another tokenizer: {made_by['file']} (sha256 {made_by['fingerprint'][:12]}), while "
            f"data.tokenizer={data.tokenizer} (sha256 {fingerprint[:12]}); set data.tokenizer to that one or prepare "
            "again"
        )
    if made_by["vocab_size"] > vocab_size:
        raise UserError(
            f"model.vocab_size={vocab_size}: the tokens of {path} go up to {made_by['vocab_size'] - 1}; "
            f"use at least {made_by['vocab_size']}"
        )
    return shards
