"""Where each rank stands on the data-, context-, tensor- and pipeline-parallel axes. Integers only, no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Coord:
    """A rank's place on each axis."""

    dp: int
    tp: int
    pp: int
    cp: int


@dataclass(frozen=True)
class Layout:
    """`world = dp * cp * tp * pp` ranks; tensor-parallel ranks are neighbours, pipeline stages are farthest apart."""

    dp: int
    tp: int = 1
    pp: int = 1
    cp: int = 1

    def __str__(self) -> str:
        return f"dp={self.dp} tp={self.tp} pp={self.pp} cp={self.cp}"

    @property
    def world(self) -> int:
        return self.dp * self.cp * self.tp * self.pp

    def rank(self, coord: Coord) -> int:
        return ((coord.pp * self.dp + coord.dp) * self.cp + coord.cp) * self.tp + coord.tp

    def coord(self, rank: int) -> Coord:
        assert 0 <= rank < self.world, f"rank {rank} is outside a layout of {self.world} ranks"
        outer, tp = divmod(rank, self.tp)
        outer, cp = divmod(outer, self.cp)
        pp, dp = divmod(outer, self.dp)
        return Coord(dp=dp, tp=tp, pp=pp, cp=cp)

    def data_parallel_groups(self) -> list[list[int]]:
        """The dp x cp ranks that hold the same slice of the model, one list a slice; ZeRO partitions over these."""
        return self._grouped(lambda coord: (coord.pp, coord.tp))

    def tensor_groups(self) -> list[list[int]]:
        """The ranks that hold the cuts of the same matrices and see the same tokens."""
        return self._grouped(lambda coord: (coord.pp, coord.dp, coord.cp))

    def context_groups(self) -> list[list[int]]:
        """The ranks that hold the same slice of the model and the parts of the same sequences, in sequence order."""
        return self._grouped(lambda coord: (coord.pp, coord.dp, coord.tp))

    def replica_groups(self) -> list[list[int]]:
        """The tp x pp ranks of one (dp, cp) that together hold one copy of the model."""
        return self._grouped(lambda coord: (coord.dp, coord.cp))

    def pipeline_groups(self) -> list[list[int]]:
        """The ranks that hand activations on to each other, in stage order."""
        return self._grouped(lambda coord: (coord.dp, coord.cp, coord.tp))

    def kv_groups(self, kv_heads: int) -> list[list[int]]:
        """The tensor-parallel ranks that hold the same key/value heads: one rank unless tp exceeds `kv_heads`."""
        assert self.tp % kv_heads == 0 or kv_heads % self.tp == 0, f"tp={self.tp} with {kv_heads} key/value heads"
        copies = max(self.tp // kv_heads, 1)
        return self._grouped(lambda coord: (coord.pp, coord.dp, coord.cp, coord.tp // copies))

    def tied_groups(self) -> list[list[int]]:
        """First and last rank of each pipeline, which share a tied embedding; none where they are the same rank."""
        pairs = [[group[0], group[-1]] for group in self.pipeline_groups()]
        return [pair for pair in pairs if pair[0] != pair[1]]

    def pipeline_edges(self) -> list[tuple[int, int]]:
        """(rank, the rank of the next stage) all round every pipeline, the last stage being followed by the first.

        In an order in which neighbours can meet at once: every other edge, then those between; whatever waits for both
        ends of an edge has pipelines of any length connected after three of them. None where a pipeline is one rank.
        """
        edges = []
        for ranks in self.pipeline_groups():
            for stage, rank in enumerate(ranks):
                closes_odd_ring = self.pp % 2 == 1 and stage == self.pp - 1
                edges.append((2 if closes_odd_ring else stage % 2, rank, ranks[(stage + 1) % self.pp]))
        return [(rank, after) for _, rank, after in sorted(edges) if rank != after]

    def _grouped(self, shared: Callable[[Coord], tuple[int, ...]]) -> list[list[int]]:
        """The ranks whose coordinates have the same `shared` part; ascending within a group and by first rank."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world):
            groups.setdefault(shared(self.coord(rank)), []).append(rank)
        return list(groups.values())


def split_layers(num_layers: int, *, stages: int, last_cost: float = 0.0) -> list[range]:
    """Consecutive layers for each stage such that the dearest stage costs least (one layer costs 1).

    `last_cost` is what the head adds to the last stage. Every stage gets at least one layer; `num_layers` must be at
    least `stages`.
    """
    assert num_layers >= stages, f"{num_layers} layers cannot fill {stages} stages"
    extra = [0.0] * stages
    extra[-1] += last_cost
    counts = [1] * stages
    for _ in range(num_layers - stages):
        # The cheapest stage takes the next layer: for identical layers this greedy choice is optimal.
        cheapest = min(range(stages), key=lambda s: counts[s] + extra[s])
        counts[cheapest] += 1
    return consecutive(counts)


def consecutive(counts: Sequence[int]) -> list[range]:
    """Neighbouring ranges of these lengths, from 0."""
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]
