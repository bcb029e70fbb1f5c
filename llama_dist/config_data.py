"""What the model reads: sources and their mixture, and what must hold between their settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field

from llama_dist.config_numbers import Check
from llama_dist.config_section import Count, CountOrZero, Flag, Positive, PositiveOrZero, Section, Seed, Text


class Source(Section):
    """One part of a mixture of training data."""

    shards: Text
    """Shard directory, as `llama-dist prepare` writes it."""
    weight: Positive = 1.0
    """Share of the samples that come from it, relative to the other sources."""
    name: Text = Field(default_factory=lambda known: known["shards"])
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
    """Shard directories to train on, with their weights."""
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
    """Steps that a background thread reads ahead; 0: each step reads its own."""
    cache: Text | None = None
    """Folder for the blocks of remote shards; null: llama_dist in $XDG_CACHE_HOME or ~/.cache."""
    cache_gb: Positive = 50.0
    """How large that folder may grow, in gigabytes."""
    verify: Flag = True
    """Whether each start reads all shards and checks their checksums; the ranks share the reading."""


def _names(sources: Sequence[Mapping[str, Any]], curriculum: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    names = [source.get("name") or source.get("shards") for source in sources]
    for name, times in Counter(names).items():
        # The same shards twice are two sources; only what has to tell them apart needs names.
        told_apart = bool(curriculum) or any(s.get("name") == name != s.get("shards") for s in sources)
        if times > 1 and told_apart:
            where = ", ".join(f"data.train.{i}" for i, other in enumerate(names) if other == name)
            yield f"data.train: {times} sources ({where}) are called {name!r}; give each a name of its own"


def _curriculum(curriculum: Sequence[Mapping[str, Any]], sources: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    names = [source.get("name") or source.get("shards") for source in sources]
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
    Check(("data.train", "data.curriculum"), _names),
    Check(("data.curriculum", "data.train"), _curriculum),
)
