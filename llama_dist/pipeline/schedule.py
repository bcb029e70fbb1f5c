"""Pipeline schedules as pure functions: which micro-batch a rank computes when. No torch in this file.

A schedule names only the compute order of each rank; `program` adds the transfers in one shared pass. All lists are
projections of one global order, so that running each list in order cannot deadlock, whatever a transport blocks on,
and the messages of a channel (two ranks, one direction) are received in the order in which they are sent.
`pp = 1` is a program without transfers: plain gradient accumulation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "W", "SEND_F", "RECV_F", "SEND_B", "RECV_B"]


class Action(NamedTuple):
    """One thing a rank does. `chunk` is the stage's index in model order.

    F is a forward, B a backward. In a schedule of SPLIT_BACKWARD, B is the gradient of the input alone and W, some time
    later, the gradients of the weights; in all others B is both.
    """

    kind: Kind
    microbatch: int
    chunk: int

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch}@{self.chunk}"


@dataclass(frozen=True)
class PipelineShape:
    """`pp` ranks in the pipeline, the micro-batches of one step, and the chunks of the model that each rank holds."""

    pp: int
    microbatches: int
    virtual_stages: int = 1

    def __post_init__(self) -> None:
        assert min(self.pp, self.microbatches, self.virtual_stages) >= 1, f"{self}: all are at least 1"

    @property
    def chunks(self) -> int:
        return self.pp * self.virtual_stages

    def rank_of(self, chunk: int) -> int:
        """The pipeline rank that holds the chunk."""
        return chunk % self.pp


def gpipe(shape: PipelineShape, rank: int) -> Iterator[Action]:
    """All forwards, then all backwards (Huang et al. 2019): simplest, and most live activations."""
    for m in range(shape.microbatches):
        yield Action("F", m, rank)
    for m in range(shape.microbatches):
        yield Action("B", m, rank)


def one_f_one_b(shape: PipelineShape, rank: int) -> Iterator[Action]:
    """1F1B (Narayanan et al. 2019): stage r keeps at most `min(pp - r, microbatches)` activations alive."""
    yield from _alternate(_grouped(shape, rank, "F"), _grouped(shape, rank, "B"), warmup=shape.pp - 1 - rank)


def interleaved(shape: PipelineShape, rank: int) -> Iterator[Action]:
    """1F1B over several chunks on a rank (Narayanan et al. 2021, section 2.2): the bubble is divided by their number.

    ValueError unless the micro-batches are a multiple of `pp`.
    """
    pp, m = shape.pp, shape.microbatches
    if m % pp:
        near = sorted({max(m - m % pp, pp), m - m % pp + pp})
        raise ValueError(
            f"schedule interleaved: {m} micro-batches over pp={pp} ranks; the micro-batches must be a multiple of pp; "
            f"use {' or '.join(map(str, near))}, or the schedule 1f1b"
        )
    # Once the distance to the last rank would do if transfers took no time; the second time hides them.
    warmup = 2 * (pp - 1 - rank) + (shape.virtual_stages - 1) * pp
    yield from _alternate(_grouped(shape, rank, "F"), _grouped(shape, rank, "B"), warmup=warmup)


def zb_h1(shape: PipelineShape, rank: int) -> Iterator[Action]:
    """ZB-H1 (Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 2.1): 1F1B whose backwards come in halves.

    A gradient reaches the previous stage after half a backward, and rank r puts its weight gradients off by r
    micro-batches to work on in the end, when 1F1B has run out of work. No rank holds more than the `pp` micro-batches
    that the first rank of 1F1B holds.
    """
    for action in one_f_one_b(shape, rank):
        yield action
        if action.kind == "B" and action.microbatch >= rank:
            yield Action("W", action.microbatch - rank, rank)
    for m in range(max(shape.microbatches - rank, 0), shape.microbatches):
        yield Action("W", m, rank)


def forward(shape: PipelineShape, rank: int) -> Iterator[Action]:
    """Forwards only, for evaluation."""
    yield from _grouped(shape, rank, "F")


def _grouped(shape: PipelineShape, rank: int, kind: Literal["F", "B"]) -> list[Action]:
    """All forwards or backwards of a rank: a group of micro-batches goes through all chunks, then the next group.

    With at least `pp` in a group, the first is back from the other ranks when the rank has been through the group. So
    each has `pp`, and the last also what is left over.
    """
    pp, m = shape.pp, shape.microbatches
    starts = [pp * i for i in range(max(m // pp, 1))]
    chunks = range(rank, shape.chunks, pp)
    return [
        Action(kind, microbatch, chunk)
        for start, end in zip(starts, [*starts[1:], m], strict=True)
        for chunk in (chunks if kind == "F" else reversed(chunks))
        for microbatch in range(start, end)
    ]


def _alternate(forwards: list[Action], backwards: list[Action], *, warmup: int) -> Iterator[Action]:
    """`warmup` forwards, then a forward and a backward in turns, then the backwards that are left."""
    warmup = min(warmup, len(forwards))
    steady = len(forwards) - warmup
    yield from forwards[:warmup]
    for pair in zip(forwards[warmup:], backwards[:steady], strict=True):
        yield from pair
    yield from backwards[steady:]


SCHEDULES: dict[str, Callable[[PipelineShape, int], Iterator[Action]]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zb-h1": zb_h1,
    "forward": forward,
}
SPLIT_BACKWARD = frozenset({"zb-h1"})  # schedules whose backward comes in halves, B and W
VIRTUAL_STAGES = frozenset({"interleaved", "forward"})  # schedules that know several chunks on a rank


def schedule_words(name: str, shape: PipelineShape) -> list[str]:
    """What a reader should know of the schedule: nothing where there is a single stage."""
    if shape.chunks == 1:
        return []
    return [f"schedule {name}" + (f" with {shape.virtual_stages} stages a rank" if shape.virtual_stages > 1 else "")]


Program = tuple[tuple[Action, ...], ...]


@lru_cache(maxsize=128)
def program(name: str, shape: PipelineShape) -> Program:
    """Every rank's full list of actions, transfers included. Worked out once for each name and shape.

    ValueError for a schedule that does not take the shape.
    """
    return tuple(tuple(actions) for actions in _play(name, shape).lists)


def costs(name: str) -> dict[str, int]:
    """What each computation takes, in forwards of a chunk: a backward has two matrix products to a forward's one."""
    if name == "forward":
        return {"F": 1}
    return {"F": 1, "B": 1, "W": 1} if name in SPLIT_BACKWARD else {"F": 1, "B": 2}


def makespan(name: str, shape: PipelineShape) -> int:
    """When the last rank is done on the simulated clock, in forwards of a chunk; transfers take no time."""
    return max(_play(name, shape).free_at)


def bubble(name: str, shape: PipelineShape) -> float:
    """The time that a step adds to the work of a rank, as a fraction of that work: on the simulated clock."""
    return makespan(name, shape) / _work(name, shape) - 1


def bubble_theory(name: str, shape: PipelineShape) -> float:
    """`bubble` by the papers' formulas, for any shape that the schedule takes.

    Narayanan et al. 2021: (pp - 1) / m for gpipe and 1f1b, (pp - 1) / (v * m) for interleaved. Qi et al. 2023:
    (pp - 1)(F + B - W) for zb-h1, a third of that of 1f1b. This and forward's over several chunks are for m >= pp; with
    fewer micro-batches a rank waits for the first to come back from the others, which adds what stands behind "+".
    """
    fill, short = shape.pp - 1, max(shape.pp - shape.microbatches, 0)
    idle = {
        "gpipe": 3 * fill,
        "1f1b": 3 * fill,
        "interleaved": 3 * fill,
        "zb-h1": fill + short,
        "forward": fill + short * (shape.virtual_stages - 1),
    }
    return idle[name] / _work(name, shape)


def _work(name: str, shape: PipelineShape) -> int:
    return shape.microbatches * shape.virtual_stages * sum(costs(name).values())


class InFlight(NamedTuple):
    """The most that a rank holds at a time, in micro-batches of one chunk."""

    activations: int  # forward done, backward (B) not
    weight_inputs: int  # B done, W not: what the weight gradients need is still there; 0 unless the backward is split
    together: int  # forward done, gradients of the weights not


def peak_in_flight(name: str, shape: PipelineShape) -> list[InFlight]:
    """What each rank holds at its worst, for a schedule with backwards. Computations end where the next one begins."""
    last = "W" if name in SPLIT_BACKWARD else "B"
    peaks = []
    for actions in program(name, shape):
        done = {"F": 0, "B": 0, last: 0}
        peak = InFlight(0, 0, 0)
        for action in actions:
            if action.kind in done:
                done[action.kind] += 1
                held = (done["F"] - done["B"], done["B"] - done[last], done["F"] - done[last])
                peak = InFlight(*map(max, peak, held))
        peaks.append(peak)
    return peaks


def _play(name: str, shape: PipelineShape) -> _Clock:
    if shape.virtual_stages > 1 and name not in VIRTUAL_STAGES:
        several = " or ".join(sorted(VIRTUAL_STAGES))
        raise ValueError(f"schedule {name}: {shape.virtual_stages} virtual stages; it takes 1, {several} takes more")
    clock = _Clock(shape, costs(name), [deque(SCHEDULES[name](shape, rank)) for rank in range(shape.pp)])
    clock.run()
    if stuck := {rank: str(order[0]) for rank, order in enumerate(clock.orders) if order}:
        raise ValueError(f"schedule {name!r} with {shape} can never run: waiting on {stuck}")
    return clock


class _Clock:
    """All ranks on one simulated clock: when each is free, what is done, and which transfers are under way.

    A computation starts as soon as its rank and its inputs allow. A transfer is written to sender and receiver at one
    instant, so that a receive stands in the list when its message can be there, and not before.
    """

    def __init__(self, shape: PipelineShape, cost: dict[str, int], orders: list[deque[Action]]) -> None:
        self.shape = shape
        self.orders = orders  # what each rank has yet to compute
        self.lists: list[list[Action]] = [[] for _ in orders]
        self.free_at = [0] * shape.pp
        self._cost = cost
        self._done_at: dict[Action, int] = {}
        self._ready: list[tuple[int, int]] = []  # heap: when which rank can start its next computation
        self._under_way: list[tuple[int, int, Action, Action]] = []  # heap: end, sender, what was computed, its taker

    def run(self) -> None:
        for rank in range(self.shape.pp):
            self._look_at(rank)
        while self._ready:  # whatever is under way has a computation that waits for it, so that nothing is left over
            now, rank = heappop(self._ready)
            self._deliver(until=now)
            self._compute(rank, now)

    def _compute(self, rank: int, now: int) -> None:
        action = self.orders[rank].popleft()
        self.lists[rank].append(action)
        self.free_at[rank] = self._done_at[action] = now + self._cost[action.kind]
        self._look_at(rank)
        taker = self._taker(action)
        if taker is None or (peer := self.shape.rank_of(taker.chunk)) == rank:
            return
        heappush(self._under_way, (self.free_at[rank], rank, action, taker))
        if self.orders[peer] and self.orders[peer][0] == taker:
            self._look_at(peer)

    def _look_at(self, rank: int) -> None:
        """Note when the rank can start its next computation, unless an input of it has no known time."""
        if self.orders[rank]:
            needs = self._needs(self.orders[rank][0])
            if all(need in self._done_at for need in needs):
                start = max([self.free_at[rank], *(self._done_at[need] for need in needs)])
                heappush(self._ready, (start, rank))

    def _needs(self, action: Action) -> list[Action]:
        """The computations whose results an action takes."""
        kind, m, chunk = action
        if kind == "F":
            return [Action("F", m, chunk - 1)] if chunk > 0 else []
        if kind == "W":
            return [Action("B", m, chunk)]
        return [Action("F", m, chunk)] + ([Action("B", m, chunk + 1)] if chunk < self.shape.chunks - 1 else [])

    def _taker(self, action: Action) -> Action | None:
        """The computation on another chunk that takes the result of an action."""
        kind, m, chunk = action
        chunk += {"F": 1, "B": -1, "W": 0}[kind]
        return Action(kind, m, chunk) if kind != "W" and 0 <= chunk < self.shape.chunks else None

    def _deliver(self, until: int) -> None:
        """Write the transfers that end by `until` into the lists of sender and receiver."""
        while self._under_way and self._under_way[0][0] <= until:
            _, rank, action, taker = heappop(self._under_way)
            send: Kind = "SEND_F" if action.kind == "F" else "SEND_B"
            receive: Kind = "RECV_F" if action.kind == "F" else "RECV_B"
            self.lists[rank].append(Action(send, action.microbatch, action.chunk))
            self.lists[self.shape.rank_of(taker.chunk)].append(Action(receive, taker.microbatch, taker.chunk))
