"""What the model reads: sources and their mixture, and what must hold between their settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field

from llama_dist.config_numbers import Check
from llama_dist.config_section import Count, CountOrZero, Flag, Positive, PositiveOrZero, Section, Seed, Text


class StreamSource(Section):
    """Text that is tokenised while the run trains on it."""

    path: Text
    """Files as for `llama-dist prepare` (a file, a glob or a URL of one), or what `datasets.load_dataset` takes: a data
    set of the hub, a folder, or a kind of file such as json."""
    name: Text | None = None
    """Configuration of the data set; null: its default."""
    split: Text = "train"
    """Which part of the data set."""
    data_files: Text | Annotated[list[Text], Field(min_length=1)] | None = None
    """Files of the data set; null: those of the split."""
    data_dir: Text | None = None
    """Folder within the data set; null: all of it."""
    revision: Text | None = None
    """Version of a data set of the hub; null: the newest, which another day may be another text."""
    text: Text = "text"
    """Column that holds the text."""
    template: Text | None = None
    """Text made of several columns, such as "{question} {answer}"; null: the column above."""
    txt: Literal["file", "line", "paragraph"] = "file"
    """What is one document of a .txt file."""
    max_skipped: Text = "0.1%"
    """How many documents that cannot be read are left out before the run stops: a number, or a share of all."""
    window: Count = 1024
    """Samples that are shuffled among themselves: a stream is read in order, and only its next samples are at hand."""


class Source(Section):
    """One part of a mixture of training data: shards, or a stream."""

    shards: Text | None = None
    """Shard directory, as `llama-dist prepare` writes it."""
    weight: Positive = 1.0
    """Share of the samples that come from it, relative to the other sources."""
    stream: StreamSource | None = None
    """Instead of shards, text that was not prepared: it is tokenised beside the training, into the run folder."""
    name: Text = Field(default_factory=lambda known: _name(known) or "")
    """What the curriculum, messages and the run's history call it; default: its path."""
    epochs: Positive | None = None
    """How often it is gone through at most, as in 2.5; it then leaves the mixture, and the others keep their ratios.
    null: as often as the run needs."""


class CurriculumStep(Section):
    """A change of the mixture."""

    step: Count
    """The first step that is made of these weights, counted from 1 as the console does."""
    weights: Annotated[dict[Text, PositiveOrZero], Field(min_length=1)]
    """Share of each source by its name; a source that is left out has 0."""


class DataConfig(Section):
    """What the model reads."""

    tokenizer: Text
    """Tokenizer file: a sentencepiece .model or a Hugging Face tokenizer.json."""
    train: Annotated[list[Source], Field(min_length=1)]
    """What to train on, with weights."""
    curriculum: list[CurriculumStep] = []
    """From which step on the sources have other weights."""
    heldout: Text | None = None
    """Shard directory for perplexity; null: none."""
    seq_len: Count
    """Tokens in a sequence."""
    seed: Seed = 0
    """Decides the order of the samples."""
    packing: Literal["concat", "best_fit"] = "concat"
    """How samples are cut: from documents one after another, or of documents that are kept whole where they fit."""
    document_mask: Flag = False
    """Whether the documents that are packed into one sequence do not see each other."""
    prefetch: CountOrZero = 2
    """Steps, or groups of small ones, that a background thread reads ahead; 0: each step reads its own."""
    cache: Text | None = None
    """Folder for the blocks of remote shards; null: llama_dist in $XDG_CACHE_HOME or ~/.cache."""
    cache_gb: Positive = 50.0
    """How large that folder may grow, in gigabytes."""
    verify: Flag = True
    """Whether each start reads all shards and checks their checksums; the ranks share the reading."""


def _name(source: Mapping[str, Any]) -> str | None:
    """What a source is called, as far as it can be told of one that may not be right."""
    stream = source.get("stream")
    path = stream.get("path") if isinstance(stream, Mapping) else getattr(stream, "path", None)
    return source.get("name") or source.get("shards") or path


def _kinds(sources: Sequence[Mapping[str, Any]], packing: str) -> Iterator[str]:
    for i, source in enumerate(sources):
        shards, stream = source.get("shards"), source.get("stream")
        if (shards is None) == (stream is None):
            found = "both" if shards else "neither"
            yield f"data.train.{i}: of shards and stream it has {found}; give one of the two"
        elif stream is not None and source.get("epochs") is not None:
            yield (
                f"data.train.{i}.epochs={source['epochs']:g}: how long a stream is shows only at its end; leave epochs "
                "out, or prepare it and name the shards"
            )
        elif stream is not None and packing != "concat":
            yield (
                f"data.packing={packing} needs all documents at hand, and data.train.{i} is a stream; use concat, or "
                "prepare it and name the shards"
            )


def _names(sources: Sequence[Mapping[str, Any]], curriculum: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    names = [_name(source) for source in sources]
    for name, times in Counter(names).items():
        # The same shards twice are two sources; only what has to tell them apart needs names.
        told_apart = bool(curriculum) or any(s.get("name") == name != _name({**s, "name": None}) for s in sources)
        if times > 1 and told_apart:
            where = ", ".join(f"data.train.{i}" for i, other in enumerate(names) if other == name)
            yield f"data.train: {times} sources ({where}) are called {name!r}; give each a name of its own"


def _curriculum(curriculum: Sequence[Mapping[str, Any]], sources: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    names = [_name(source) for source in sources]
    for i, entry in enumerate(curriculum):
        unknown = [name for name in entry["weights"] if name not in names]
        if unknown:
            yield (
                f"data.curriculum.{i}.weights: data.train has no source {unknown[0]!r}; "
                f"it has {', '.join(map(str, names))}"
            )
        if not any(entry["weights"].values()):
            yield f"data.curriculum.{i}.weights are all 0; give at least one source a weight above 0"
    for i, (before, after) in enumerate(pairwise(curriculum), start=1):
        if after["step"] <= before["step"]:
            yield (
                f"data.curriculum.{i}.step={after['step']} does not come after data.curriculum.{i - 1}.step="
                f"{before['step']}; put the steps in rising order"
            )


DATA_CHECKS: tuple[Check, ...] = (
    Check(("data.train", "data.packing"), _kinds),
    Check(("data.train", "data.curriculum"), _names),
    Check(("data.curriculum", "data.train"), _curriculum),
)
