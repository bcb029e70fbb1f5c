"""Where each rank stands on the data-, tensor- and pipeline-parallel axes. Integers only, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Coord:
    """A rank's place on each axis."""

    dp: int
    tp: int
    pp: int


@dataclass(frozen=True)
class Layout:
    """`world = dp * tp * pp` ranks; tensor-parallel ranks are neighbours, pipeline stages are farthest apart."""

    dp: int
    tp: int = 1
    pp: int = 1

    @property
    def world(self) -> int:
        return self.dp * self.tp * self.pp

    def rank(self, coord: Coord) -> int:
        return (coord.pp * self.dp + coord.dp) * self.tp + coord.tp

    def coord(self, rank: int) -> Coord:
        assert 0 <= rank < self.world, f"rank {rank} is outside a layout of {self.world} ranks"
        outer, tp = divmod(rank, self.tp)
        pp, dp = divmod(outer, self.dp)
        return Coord(dp=dp, tp=tp, pp=pp)

    def data_parallel_groups(self) -> list[list[int]]:
        """The ranks that hold the same slice of the model, one list for each slice; ZeRO partitions over these."""
        return [
            [self.rank(Coord(dp, tp, pp)) for dp in range(self.dp)] for pp in range(self.pp) for tp in range(self.tp)
        ]

    def replica_groups(self) -> list[list[int]]:
        """The tp x pp ranks that together hold one copy of the model, one list for each replica."""
        return [
            [self.rank(Coord(dp, tp, pp)) for pp in range(self.pp) for tp in range(self.tp)] for dp in range(self.dp)
        ]

    def pipeline_groups(self) -> list[list[int]]:
        """The ranks that hand activations on to each other, in stage order, one list for each (dp, tp)."""
        return [
            [self.rank(Coord(dp, tp, pp)) for pp in range(self.pp)] for dp in range(self.dp) for tp in range(self.tp)
        ]


def split_layers(num_layers: int, *, stages: int, first_cost: float = 0.0, last_cost: float = 0.0) -> list[range]:
    """Consecutive layers for each stage such that the dearest stage costs least (one layer costs 1).

    `first_cost` and `last_cost` are what the embedding adds to the first stage and the head to the last. Every
    stage gets at least one layer; `num_layers` must be at least `stages`.
    """
    assert num_layers >= stages, f"{num_layers} layers cannot fill {stages} stages"
    extra = [0.0] * stages
    extra[0] += first_cost
    extra[-1] += last_cost
    counts = [1] * stages
    for _ in range(num_layers - stages):
        # The cheapest stage takes the next layer: for identical layers this greedy choice is optimal.
        cheapest = min(range(stages), key=lambda s: counts[s] + extra[s])
        counts[cheapest] += 1
    return _ranges(counts)


def _ranges(counts: Sequence[int]) -> list[range]:
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]
