"""A run's saves: when they are done, what is said of them, which checkpoints stay."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.markup import escape

from llama_dist.checkpoint.dcp import NotFiniteError
from llama_dist.checkpoint.local_level import LocalLevel
from llama_dist.checkpoint.pieces import Piece
from llama_dist.checkpoint.places import Place
from llama_dist.checkpoint.retention import doomed, step_of
from llama_dist.checkpoint.saver import Saved, Saver
from llama_dist.checkpoint.store import Position, folder_name, open_place
from llama_dist.config import CheckpointConfig, RunConfig

EVALS = "evals"
LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte")


class Tell(Protocol):
    """Says a line to the reader and writes an event into the ledger, on the coordinator."""

    def __call__(self, text: str, event: str | None = None, **fields: Any) -> None: ...


def place_of(run: RunConfig) -> Place:
    """Where a run keeps its checkpoints."""
    return open_place(run.checkpoint.folder or Path(run.folder) / "checkpoints")


@dataclass
class Saves:
    """Begins saves, and tells how they ended when that is known. All ranks make the same calls in the same order.

    `saved_at` is the step of the newest checkpoint that was committed or loaded; `diverged` is set when a state that
    was to be saved held values that are no numbers.
    """

    saver: Saver
    place: Place
    tell: Tell
    saved_at: int = -1
    diverged: tuple[Position, NotFiniteError] | None = None

    def begin(
        self, position: Position, pieces: list[Piece], state: dict[str, Any], *, wait: bool, local: bool = False
    ) -> None:
        """Save; with `wait`, return when it is done. Waits for the save before in any case.

        `local`: to the nodes' own disks.
        """
        self._note(self.saver.save(position, pieces, state, wait=wait, local=local))
        if wait:
            self._note(self.saver.finish())

    def before_update(self) -> None:
        """Wait until the optimizer may change the state again."""
        self.saver.before_update()

    def poll(self) -> None:
        """Take note of a save that has ended."""
        self._note(self.saver.poll())

    def finish(self) -> None:
        """Wait for the save under way, if there is one."""
        self._note(self.saver.finish())

    def _note(self, saved: Saved | None) -> None:
        if saved is None:
            return
        step = saved.position.step
        if isinstance(saved.error, NotFiniteError):
            self.diverged = saved.position, saved.error
        elif saved.error is not None:
            self.tell(f"[red]{escape(str(saved.error))}[/]", "save_failed", step=step, reason=str(saved.error))
        else:
            self.saved_at = step
            times = {"blocked_seconds": round(saved.blocked, 4), "seconds": round(saved.seconds, 4)}
            if saved.local:
                self.tell(f"[dim]saved step {step} on the nodes[/]", "save_local", step=step, **times)
            else:
                self.tell(f"[dim]saved {escape(self.place.where)}/{saved.name}[/]", "save", step=step, **times)
        if saved.pruned:
            self.tell("", "prune", pruned=list(saved.pruned))
        if saved.prune_problem:
            problem = saved.prune_problem
            self.tell(f"[red]old checkpoints stay: {escape(problem)}[/]", "prune_failed", reason=problem)


@dataclass
class Pruning:
    """Deletes what need not stay, after each commit, on the coordinator.

    `damaged`: committed checkpoints that were passed over at the start.
    """

    place: Place
    config: CheckpointConfig
    folder: Path
    damaged: Collection[str] = field(default=())

    def __call__(self, saved: str) -> list[str]:
        """Prune after `saved` was committed, and return what is gone. Raises OSError."""
        self.damaged = [name for name in self.damaged if name != saved]  # the new one took its place
        names = self.place.names()
        gone = doomed(
            names,
            keep=self.config.keep,
            keep_every=self.config.keep_every,
            best=best_of(self.folder / EVALS, self.config.best, names) if self.config.best else None,
            damaged=self.damaged,
        )
        for name in gone:
            self.place.discard(name)
        return gone


def best_of(evals: Path, metric: str, names: Collection[str]) -> str | None:
    """Of these checkpoints the one whose evaluation was best by `metric` ("heldout/loss"), the newest of equals."""
    task, _, key = metric.rpartition("/")
    scores: dict[str, float] = {}
    for name in names:
        path = evals / f"{folder_name(Position(step_of(name)))}.json"
        try:
            value = json.loads(path.read_text())["results"][task][key]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not evaluated, or not on this task
        if not isinstance(value, (int, float)) or math.isnan(value):
            continue
        scores[name] = -value if key in LOWER_IS_BETTER else value
    return max(sorted(scores, reverse=True), key=scores.__getitem__, default=None)


def build_saves(
    run: RunConfig,
    place: Place,
    *,
    attempt: int,
    group: Any,
    is_coordinator: bool,
    tell: Tell,
    may_commit: Callable[[], str | None],
    damaged: Collection[str] = (),
    local: LocalLevel | None = None,
) -> Saves:
    """The saves of one start of a run."""
    prune = Pruning(place, run.checkpoint, Path(run.folder), damaged) if is_coordinator else None
    saver = Saver(place, attempt=attempt, group=group, may_commit=may_commit, prune=prune, local=local)
    return Saves(saver, place, tell)
