"""Mixtures that change: position in the run -> (source, the source's own position), through any number of phases.

A phase is a position and the weights of the sources from there on. Weights change by the curriculum, by a new config
in mid-run, and where a source has had its epochs. Each source goes on where earlier phases left it, so that nothing is
lost or repeated. Sources go by their number in the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from llama_dist.data.order import position_of, shares_of, source_at, taken_by
from llama_dist.errors import UserError

FAR = 1 << 62  # beyond any run, and within int64


@dataclass(frozen=True)
class Phase:
    """From position `first` on: (number of a source, its weight), numbers rising; none: there is no more data."""

    first: int
    weights: tuple[tuple[int, float], ...]

    @property
    def numbers(self) -> list[int]:
        return [number for number, _ in self.weights]

    @property
    def ratios(self) -> list[float]:
        return [weight for _, weight in self.weights]

    def mixes_as(self, other: Phase) -> bool:
        """Whether both give the same sources the same shares."""
        return self.numbers == other.numbers and (
            not self.weights or shares_of(self.ratios) == shares_of(other.ratios)
        )


class Mixture:
    """The sequence that some phases make, of which the first begins at position 0.

    Within a phase every source has had its share after any number of positions, to less than one sample.
    """

    def __init__(self, phases: Sequence[Phase]) -> None:
        assert phases and phases[0].first == 0, f"phases begin at 0: {phases}"
        self.phases = tuple(phases)
        self._firsts = np.array([phase.first for phase in phases], dtype=np.int64)
        assert np.all(np.diff(self._firsts) > 0), f"phases rise: {phases}"
        self._taken: list[dict[int, int]] = [{}]  # of each source, before each phase
        for phase, after in zip(phases, phases[1:], strict=False):
            self._taken.append(_plus(self._taken[-1], phase, after.first - phase.first))

    @property
    def end(self) -> int | None:
        """Where the data ends; None: never."""
        return None if self.phases[-1].weights else self.phases[-1].first

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(number of the source, position within that source) of each position of the run, both int64."""
        positions = np.asarray(positions, dtype=np.int64)
        which = np.searchsorted(self._firsts, positions, side="right") - 1
        number, own = np.empty_like(positions), np.empty_like(positions)
        for i in np.unique(which):
            phase, here = self.phases[i], which == i
            assert phase.weights, f"position {positions[here][0]} lies behind the end of the data, {phase.first}"
            source, own[here] = source_at(positions[here] - phase.first, weights=phase.ratios)
            before = np.array([self._taken[i].get(n, 0) for n in phase.numbers], dtype=np.int64)
            own[here] += before[source]
            number[here] = np.array(phase.numbers, dtype=np.int64)[source]
        return number, own

    def taken(self, position: int) -> dict[int, int]:
        """How many samples of each source lie before a position."""
        i = int(np.searchsorted(self._firsts, position, side="right")) - 1
        return _plus(self._taken[i], self.phases[i], position - self.phases[i].first)

    def phase_at(self, position: int) -> Phase:
        return self.phases[int(np.searchsorted(self._firsts, position, side="right")) - 1]

    def reaches(self, number: int, own: int) -> int:
        """The position, in the last phase, of a source's sample number `own`, which earlier phases did not take."""
        phase, before = self.phases[-1], self._taken[-1].get(number, 0)
        source = phase.numbers.index(number)
        return phase.first + position_of(own - before, source=source, weights=phase.ratios)


def plan(
    past: Sequence[Phase], ahead: Sequence[Phase], limits: Mapping[int, int], *, until: int = FAR
) -> Mixture:
    """The phases that were, cut where those `ahead` begin, and then those; each source leaves at its limit.

    `limits[s]` is the most samples that source `s` may give in the whole run. It leaves at the very position behind its
    last sample, and the others keep their ratios. Where none is left the data ends, whatever may be ahead. Nothing is
    looked for behind position `until`.
    """
    start = ahead[0].first
    phases = [phase for phase in past if phase.first < start]
    for wanted, after in zip(ahead, [*ahead[1:], None], strict=True):
        stop = FAR if after is None else after.first
        at = wanted.first
        while at < stop and at <= until:
            taken = Mixture(phases).taken(at) if phases else {}
            left = tuple((n, w) for n, w in wanted.weights if taken.get(n, 0) < limits.get(n, FAR))
            phase = Phase(at, left)
            if not phases or not phases[-1].mixes_as(phase):
                phases.append(phase)
            if not left:
                return Mixture(phases)
            mixture = Mixture(phases)
            at = min([mixture.reaches(n, limits[n] - 1) + 1 for n, _ in left if limits.get(n, FAR) < FAR], default=FAR)
    return Mixture(phases)


def limit_of(epochs: float | None, size: int | None, *, where: str) -> int | None:
    """How many samples a source of `size` may give; None: as many as the run needs. Raises UserError for none."""
    if epochs is None or size is None:
        return None
    limit = int(Fraction(str(epochs)) * size)
    if limit < 1:
        raise UserError(
            f"{where}: epochs={epochs:g} of its {size} samples is less than one; use at least {1 / size:.2g}"
        )
    return min(limit, FAR)


def _plus(taken: Mapping[int, int], phase: Phase, count: int) -> dict[int, int]:
    """What each source has given after `count` more positions of a phase."""
    total = dict(taken)
    if count and phase.weights:
        for number, more in zip(phase.numbers, taken_by(count, weights=phase.ratios), strict=True):
            total[number] = total.get(number, 0) + more
    return total
