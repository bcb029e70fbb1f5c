"""What is to be cleaned out, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llama_dist.data.clean.filters import FilterChoice, settings_of
from llama_dist.data.clean.jsonl import SUFFIXES
from llama_dist.data.clean.minhash import PLACES, SHINGLE_WORDS, rows_for
from llama_dist.data.clean.overlap import RUN_WORDS
from llama_dist.data.documents import Reading
from llama_dist.data.skips import SkipLimit
from llama_dist.errors import UserError

DEDUPS = ("exact", "near")
LEAST_SIMILARITY = 0.5


@dataclass(frozen=True)
class Choices:
    """What is to be done; only the filters, --dedup or --against, or any of them.

    similarity: of near duplicates, at least (estimated Jaccard index of shingles). run_words, overlap: see overlap.py;
    a document with so many runs in common goes. max_skipped: how many documents may be unreadable, a number or a share
    such as "0.1%". removed_texts: the list of what was removed has the texts, too. Raises UserError for what makes no
    sense.
    """

    filters: Sequence[FilterChoice] = ()
    dedup: Sequence[str] = ()
    similarity: float = 0.8
    against: Sequence[str | Path] = ()
    against_reading: Reading = field(default_factory=Reading)
    run_words: int = RUN_WORDS
    overlap: int = 1
    reading: Reading = field(default_factory=Reading)
    max_skipped: str = "0.1%"
    report_only: bool = False
    removed_texts: bool = False
    suffix: str = SUFFIXES[0]

    def __post_init__(self) -> None:
        for name in self.dedup:
            if name not in DEDUPS:
                raise UserError(f"dedup: {name!r} is not one; there are {' and '.join(DEDUPS)}")
        if not (self.filters or self.dedup or self.against):
            raise UserError("there is nothing to do; give --filters, --dedup or --against")
        if not LEAST_SIMILARITY <= self.similarity <= 1:
            raise UserError(f"similarity={self.similarity}: must be from {LEAST_SIMILARITY} to 1 (the same shingles)")
        SkipLimit(self.max_skipped)  # says what is wrong with it
        for name in ("run_words", "overlap"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.suffix not in SUFFIXES:
            raise UserError(f"format: {self.suffix!r} is not one; there are {' and '.join(SUFFIXES)}")

    @property
    def rows(self) -> int:
        """Places in a band of signatures; 0: near duplicates are not looked for."""
        return rows_for(self.similarity) if "near" in self.dedup else 0

    def as_settings(self) -> dict[str, Any]:
        """All that the result depends on beside the inputs, for the report."""
        settings: dict[str, Any] = {
            "filters": {one.name: {**settings_of(one.name), **one.settings} for one in self.filters},
            "dedup": list(self.dedup),
            "reading": asdict(self.reading),
            "max_skipped": self.max_skipped,
        }
        if self.rows:
            settings["near"] = {
                "similarity": self.similarity,
                "shingle_words": SHINGLE_WORDS,
                "places": PLACES,
                "rows_in_a_band": self.rows,
            }
        if self.against:
            settings["against"] = {
                "files": list(map(str, self.against)),
                "reading": asdict(self.against_reading),
                "run_words": self.run_words,
                "overlap": self.overlap,
            }
        return settings
