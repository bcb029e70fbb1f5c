"""The sources of a config, opened: each kind of source and each way of packing becomes samples by number."""

from __future__ import annotations

from dataclasses import dataclass

from llama_dist.config_data import DataConfig, Source, StreamSource
from llama_dist.data.history import Known, Present
from llama_dist.data.packing import BestFit, identity_of
from llama_dist.data.remote import open_storage
from llama_dist.data.samples import Concatenated, Samples, Span
from llama_dist.data.shards import Shards
from llama_dist.data.skips import SkipLimit
from llama_dist.data.stream import Spools, Stream, reading_of, spelled, spool_of
from llama_dist.data.stream import identity_of as stream_identity
from llama_dist.data.tokenizer import fingerprint_of, load_tokenizer
from llama_dist.errors import UserError


@dataclass(frozen=True)
class OpenSource:
    """A source that can be read. `known.identity` is a hash of its content, wherever that lies."""

    known: Known
    samples: Samples
    content: Shards | Stream

    @property
    def shards(self) -> Shards:
        """Its documents; of a stream those that are there. Raises UserError where none is."""
        return self.content.shards if isinstance(self.content, Stream) else self.content

    def present(self, source: Source) -> Present:
        """It, as the config has it."""
        return Present(self.known, source.weight, source.epochs, self.samples.size)

    def file_of(self, span: Span) -> str:
        """The file that a part of a document begins in."""
        return self.shards.pair_of(self.shards.document_span(span.document)[0] + span.start)


def open_sources(data: DataConfig, *, vocab_size: int, spools: Spools | None = None) -> list[OpenSource]:
    """All of data.train. Raises UserError where shards, tokenizer, vocabulary and length do not go together."""
    fingerprint = fingerprint_of(data.tokenizer)
    return [
        open_source(source, data, fingerprint=fingerprint, vocab_size=vocab_size, spools=spools)
        for source in data.train
    ]


def open_source(
    source: Source, data: DataConfig, *, fingerprint: str, vocab_size: int, spools: Spools | None = None
) -> OpenSource:
    """One source of `data`; `fingerprint` is that of data.tokenizer."""
    if source.stream is not None:
        return _open_stream(source, source.stream, data, fingerprint=fingerprint, vocab_size=vocab_size, spools=spools)
    assert source.shards is not None, "a source that is no stream has shards"
    shards = open_shards(source.shards, data, fingerprint=fingerprint, vocab_size=vocab_size)
    known = Known(source.name, identity_of(shards), source.model_dump(mode="json"))
    return OpenSource(known, open_samples(shards, data), shards)


def _open_stream(
    source: Source,
    settings: StreamSource,
    data: DataConfig,
    *,
    fingerprint: str,
    vocab_size: int,
    spools: Spools | None,
) -> OpenSource:
    """A stream, wherever its text has come to; of its settings all is said here that can be said without reading."""
    if spools is None:
        raise UserError(f"{source.name}: is a stream, which only a run has; prepare its text, and name the shards")
    spelled(settings)
    reading_of(settings)
    SkipLimit(settings.max_skipped)
    check_vocabulary(source.name, load_tokenizer(data.tokenizer).vocab_size, vocab_size)
    folder = spool_of(settings, fingerprint, spools.folder)
    stream = Stream(folder, data.seq_len, window=settings.window, wait_seconds=spools.wait_seconds)
    known = Known(source.name, stream_identity(settings, fingerprint), source.model_dump(mode="json"))
    return OpenSource(known, stream, stream)


def open_samples(shards: Shards, data: DataConfig) -> Samples:
    """Shards cut into samples as data.packing says."""
    kinds = {"concat": Concatenated, "best_fit": BestFit}
    return kinds[data.packing](shards, data.seq_len)


def open_known(known: Known, data: DataConfig, *, vocab_size: int, spools: Spools | None = None) -> OpenSource:
    """A source that a run has or had, where it was last. Raises UserError where its content is another by now."""
    source = Source(**known.source)
    fingerprint = fingerprint_of(data.tokenizer)
    opened = open_source(source, data, fingerprint=fingerprint, vocab_size=vocab_size, spools=spools)
    if opened.known.identity != known.identity:
        raise UserError(
            f"{source.shards or source.name}: holds something else than when the run read it as {known.name!r} (sha256 "
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
    check_vocabulary(path, made_by["vocab_size"], vocab_size)
    return shards


def check_vocabulary(name: str, made_by: int, vocab_size: int) -> None:
    """Raise UserError where a model of `vocab_size` has too few ids for tokens of a tokenizer of `made_by`."""
    if made_by > vocab_size:
        raise UserError(
            f"model.vocab_size={vocab_size}: the tokens of {name} go up to {made_by - 1}; use at least {made_by}"
        )
