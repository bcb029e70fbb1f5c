"""Pipeline schedules as pure functions: which micro-batch a rank computes when. No torch in this file.

A schedule names only the compute order of each rank; `program` adds the transfers in one shared pass. All lists are
projections of one global order, so that running each list in order cannot deadlock, whatever a transport blocks on.
`pp = 1` is a program without transfers: plain gradient accumulation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "SEND_F", "RECV_F", "SEND_B", "RECV_B"]
COST = {"F": 1, "B": 2}  # on the simulated clock; a backward has two matrix products to a forward's one


class Action(NamedTuple):
    """One thing a rank does. `chunk` is the stage's index in model order."""

    kind: Kind
    microbatch: int
    chunk: int

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch}@{self.chunk}"


@dataclass(frozen=True)
class PipelineShape:
    """`pp` ranks in the pipeline, one stage each, and the micro-batches of one step."""

    pp: int
    microbatches: int


def gpipe(shape: PipelineShape, rank: int) -> Iterator[Action]:
    """All forwards, then all backwards (Huang et al. 2019): simplest, and most live activations."""
    for m in range(shape.microbatches):
        yield Action("F", m, rank)
    for m in range(shape.microbatches):
        yield Action("B", m, rank)


def one_f_one_b(shape: PipelineShape, rank: int) -> Iterator[Action]:
    """1F1B (Narayanan et al. 2019): stage r keeps at most `min(pp - r, microbatches)` activations alive."""
    warmup = min(shape.pp - 1 - rank, shape.microbatches)
    for m in range(warmup):
        yield Action("F", m, rank)
    for m in range(shape.microbatches - warmup):
        yield Action("F", m + warmup, rank)
        yield Action("B", m, rank)
    for m in range(shape.microbatches - warmup, shape.microbatches):
        yield Action("B", m, rank)


SCHEDULES: dict[str, Callable[[PipelineShape, int], Iterator[Action]]] = {"gpipe": gpipe, "1f1b": one_f_one_b}


def program(name: str, shape: PipelineShape) -> list[list[Action]]:
    """Every rank's full action list, transfers included.

    Plays all ranks on one simulated clock and appends each transfer to sender and receiver at the same instant, so
    that a receive stands in the list when its message can be there, and not before.
    """
    queues = [list(SCHEDULES[name](shape, rank)) for rank in range(shape.pp)]
    clock = _Clock(shape)
    while any(queues):
        ready = [(t, r) for r, queue in enumerate(queues) if queue and (t := clock.start_of(queue[0])) is not None]
        if not ready:
            stuck = {r: str(queue[0]) for r, queue in enumerate(queues) if queue}
            raise ValueError(f"schedule {name!r} with {shape} can never run: waiting on {stuck}")
        now, rank = min(ready)
        clock.deliver(until=now)
        clock.compute(queues[rank].pop(0), now)
    clock.deliver(until=max(clock.free_at))
    return clock.lists


class _Clock:
    """The simulated pipeline: when each rank is free, what is done, and which transfers are under way."""

    def __init__(self, shape: PipelineShape) -> None:
        self.shape = shape
        self.lists: list[list[Action]] = [[] for _ in range(shape.pp)]
        self.free_at = [0] * shape.pp
        self._done_at: dict[Action, int] = {}
        self._under_way: list[tuple[int, int, Action]] = []

    def start_of(self, action: Action) -> int | None:
        """When the action's inputs are there and its rank is free, or None while an input has no known time."""
        kind, m, chunk = action
        needs = [Action("F", m, chunk - 1)] if kind == "F" else [Action("F", m, chunk), Action("B", m, chunk + 1)]
        needs = [need for need in needs if 0 <= need.chunk < self.shape.pp]
        if any(need not in self._done_at for need in needs):
            return None
        return max([self.free_at[chunk], *(self._done_at[need] for need in needs)])

    def compute(self, action: Action, now: int) -> None:
        rank = action.chunk
        self.lists[rank].append(action)
        self.free_at[rank] = self._done_at[action] = now + COST[action.kind]
        if 0 <= _peer(action) < self.shape.pp:
            self._under_way.append((self.free_at[rank], rank, action))

    def deliver(self, until: int) -> None:
        """Write the transfers that end by `until` into the lists of sender and receiver."""
        self._under_way.sort()
        while self._under_way and self._under_way[0][0] <= until:
            _, rank, action = self._under_way.pop(0)
            peer = _peer(action)
            send: Kind = "SEND_F" if action.kind == "F" else "SEND_B"
            receive: Kind = "RECV_F" if action.kind == "F" else "RECV_B"
            self.lists[rank].append(Action(send, action.microbatch, action.chunk))
            self.lists[peer].append(Action(receive, action.microbatch, peer))


def _peer(action: Action) -> int:
    """The chunk that takes the result of a compute action: the next for a forward, the previous for a backward."""
    return action.chunk + 1 if action.kind == "F" else action.chunk - 1
