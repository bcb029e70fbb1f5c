"""What a run has read and will read: its sources by number, its phases and its batches, kept in each checkpoint.

With it the samples of any step, past or to come, are a function of the step alone, whatever has changed in mid-run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from llama_dist.config_data import CurriculumStep
from llama_dist.data.mixture import FAR, Mixture, Phase, limit_of, plan
from llama_dist.data.order import shares_of
from llama_dist.errors import UserError


@dataclass(frozen=True)
class Known:
    """A source that the run has or had. Its number is its place among them, by first appearance.

    `identity` is a hash of its content, wherever that lies; `source` its settings when it was last used.
    """

    name: str
    identity: str
    source: Mapping[str, Any]


@dataclass(frozen=True)
class Pace:
    """After `step` steps, which took `samples` samples, each takes `batch` more."""

    step: int
    samples: int
    batch: int

    def samples_at(self, steps: int) -> int:
        """The position after so many steps at this pace."""
        return self.samples + (steps - self.step) * self.batch


@dataclass(frozen=True)
class Present:
    """A source of the config as it was found: `size` is its number of samples, None where nobody knows."""

    known: Known
    weight: float
    epochs: float | None
    size: int | None


@dataclass(frozen=True)
class History:
    """All that decides which sample stands where in a run, beside the sources' content, the seed and the length."""

    sources: tuple[Known, ...]
    phases: tuple[Phase, ...]
    paces: tuple[Pace, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> History:
        return cls(
            tuple(Known(**source) for source in values["sources"]),
            tuple(Phase(p["first"], tuple((int(n), float(w)) for n, w in p["weights"])) for p in values["phases"]),
            tuple(Pace(**pace) for pace in values["paces"]),
        )

    def positions_of(self, step: int) -> range:
        """The positions that a step (from 1) takes. Raises UserError for a step before the history begins."""
        paces = [pace for pace in self.paces if pace.step < step]
        if not paces:
            raise UserError(f"step {step}: the run's history of batches begins after step {self.paces[0].step}")
        return range(paces[-1].samples_at(step - 1), paces[-1].samples_at(step))

    def words(self, phase: Phase) -> str:
        """`web 75%, books 25%`."""
        if not phase.weights:
            return "no more data"
        shares = shares_of(phase.ratios)
        parts = zip(phase.numbers, shares, strict=True)
        return ", ".join(f"{self.sources[number].name} {100 * share / sum(shares):.4g}%" for number, share in parts)


def continue_history(
    history: History | None,
    sources: Sequence[Present],
    curriculum: Sequence[CurriculumStep],
    *,
    now: Pace,
    steps: int | None = None,
) -> tuple[History, list[int]]:
    """The history of a run that goes on from `now` with these sources, and the number of each of them.

    Curriculum steps that lie ahead are turned into positions at the present batch. Raises UserError where a source
    has another content than under the same name before, and where the data ends before `steps` are made.
    """
    known, numbers = _number(history.sources if history else (), sources)
    ahead = _ahead(sources, numbers, curriculum, now)
    limits = {}
    for number, source in zip(numbers, sources, strict=True):
        limit = limit_of(source.epochs, source.size, where=f"data.train ({source.known.name})")
        if limit is not None:
            limits[number] = limit
    until = FAR if steps is None else max(now.samples_at(steps), now.samples)
    mixture = plan(history.phases if history else (), ahead, limits, until=until)
    if steps is not None and mixture.end is not None and mixture.end < until:
        raise UserError(_ended(mixture.end, ahead, known, limits, now, steps))
    paces = tuple(pace for pace in (history.paces if history else ()) if pace.step < now.step)
    if not paces or paces[-1].batch != now.batch:
        paces += (now,)
    return History(known, mixture.phases, paces), numbers


def switch_between(before: History, after: History, position: int) -> str | None:
    """What is other at a position than it was to be before, in words; None where nothing is."""
    then, now = Mixture(before.phases).phase_at(position), Mixture(after.phases).phase_at(position)
    if then.mixes_as(now):
        return None
    return f"from sample {position} on: {after.words(now)}; it would have been: {after.words(then)}"


def changes_ahead(history: History, now: Pace, steps: int) -> list[str]:
    """The changes of the mixture that the run will come to, in words."""
    told = []
    for phase in history.phases:
        if now.samples < phase.first < now.samples_at(steps):
            step = now.step + (phase.first - now.samples) // now.batch + 1
            told.append(f"from sample {phase.first} (step {step}) on: {history.words(phase)}")
    return told


def _number(known: Sequence[Known], sources: Sequence[Present]) -> tuple[tuple[Known, ...], list[int]]:
    """The numbers of the config's sources: those they had, or new ones. Returns all sources and these numbers."""
    registry, numbers = list(known), [-1] * len(sources)
    for by_name in (True, False):  # of equal sources the one of that name, where there is one
        for i, source in enumerate(sources):
            free = [
                n for n, old in enumerate(registry)
                if n not in numbers
                and old.identity == source.known.identity
                and (old.name == source.known.name or not by_name)
            ]  # fmt: skip
            if numbers[i] < 0 and free:
                numbers[i] = free[0]
                registry[free[0]] = replace(source.known)
    for i, source in enumerate(sources):
        others = [old for old in known if old.name == source.known.name]
        if others and all(old.identity != source.known.identity for old in others):
            before = [old.name for old in known if old.identity == source.known.identity]
            raise UserError(
                f"data.train.{i}: the content of source {source.known.name!r} is not what the run has read so far "
                f"(sha256 {others[0].identity[:12]} then, {source.known.identity[:12]} now"
                f"{f', which was {before[0]!r}' if before else ''}); give back the shards of then, or name the new "
                f"ones {repr(before[0]) if before else 'otherwise'} by data.train.{i}.name"
            )
        if numbers[i] < 0:
            numbers[i] = len(registry)
            registry.append(source.known)
    return tuple(registry), numbers


def _ahead(
    sources: Sequence[Present], numbers: Sequence[int], curriculum: Sequence[CurriculumStep], now: Pace
) -> list[Phase]:
    """The weights as the config has them from the present position on, before any source leaves."""
    phases = [_phase(now.samples, numbers, [source.weight for source in sources])]
    for entry in curriculum:
        weights = [entry.weights.get(source.known.name, 0.0) for source in sources]
        phase = _phase(max(now.samples_at(entry.step - 1), now.samples), numbers, weights)
        phases = [*(other for other in phases if other.first < phase.first), phase]
    return phases


def _phase(first: int, numbers: Sequence[int], weights: Sequence[float]) -> Phase:
    return Phase(first, tuple(sorted((n, weight) for n, weight in zip(numbers, weights, strict=True) if weight > 0)))


def _ended(
    end: int, ahead: Sequence[Phase], known: Sequence[Known], limits: Mapping[int, int], now: Pace, steps: int
) -> str:
    step = now.step + (end - now.samples) // now.batch + 1
    wanted = [phase for phase in ahead if phase.first <= end][-1]
    had = ", ".join(f"{known[n].name} ({limits[n]} samples)" for n in wanted.numbers)
    fewer = f", or use train.steps={step - 1}" if step > 1 else ""
    return (
        f"train.steps={steps}: the data ends before step {step} is whole, at sample {end} of the run: every source of "
        f"the mixture has had its epochs by then: {had}; raise data.train.N.epochs, add a source"
        f"{fewer}"
    )
