"""Every schedule, at many shapes: complete, free of deadlock, as lean and as fast as theory says."""

from __future__ import annotations

import math
import re
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from functools import cache

import pytest

from llama_dist.pipeline.schedule import (
    SCHEDULES,
    SPLIT_BACKWARD,
    VIRTUAL_STAGES,
    Action,
    InFlight,
    PipelineShape,
    bubble,
    bubble_theory,
    costs,
    makespan,
    peak_in_flight,
    program,
)

Lists = Sequence[Sequence[Action]]
NAMES = ("gpipe", "1f1b", "interleaved", "zb-h1", "forward")
TRAINING = tuple(name for name in NAMES if name != "forward")
PAIRS = {"SEND_F": "RECV_F", "SEND_B": "RECV_B"}
cached = cache(program)  # each of the tests below goes through all shapes

every_schedule = pytest.mark.parametrize("name", NAMES)


def shapes(name: str) -> Iterator[PipelineShape]:
    """All shapes that the schedule takes, of up to 8 ranks, 17 micro-batches and 4 virtual stages."""
    for pp in range(1, 9):
        for m in range(1, 18):
            for v in range(1, 5 if name in VIRTUAL_STAGES else 2):
                if name != "interleaved" or m % pp == 0:
                    yield PipelineShape(pp, m, v)


def kinds_of(name: str) -> set[str]:
    return {"F"} if name == "forward" else {"F", "B", "W"} if name in SPLIT_BACKWARD else {"F", "B"}


def other_end(action: Action) -> int:
    """The chunk at the other end of a transfer."""
    return action.chunk + (1 if action.kind in ("SEND_F", "RECV_B") else -1)


def mirrored(send: Action) -> Action:
    """The receive that belongs to a send."""
    return Action(PAIRS[send.kind], send.microbatch, other_end(send))  # type: ignore[arg-type]


def run_blocking(lists: Lists, cost: dict[str, int]) -> tuple[int, list[Action]]:
    """Run the lists with sends that wait for their receiver: (makespan, what each rank was stuck at).

    A transfer takes no time, but it takes place when both ends have come to it and not before.
    """
    at, clock = [0] * len(lists), [0] * len(lists)
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(lists):
            while at[rank] < len(actions):
                action = actions[at[rank]]
                if action.kind in cost:
                    clock[rank] += cost[action.kind]
                elif action.kind in PAIRS:
                    peer = other_end(action) % len(lists)
                    if at[peer] == len(lists[peer]) or lists[peer][at[peer]] != mirrored(action):
                        break
                    clock[rank] = clock[peer] = max(clock[rank], clock[peer])
                    at[peer] += 1
                else:
                    break  # a receive is passed by its sender
                at[rank] += 1
                moved = True
    return max(clock), [actions[i] for actions, i in zip(lists, at, strict=True) if i < len(actions)]


def run_buffered(lists: Lists, cost: dict[str, int]) -> int:
    """The makespan with sends that wait for nobody, and receives that wait where they stand in the list."""
    at, clock = [0] * len(lists), [0] * len(lists)
    sent_at: dict[Action, int] = {}
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(lists):
            while at[rank] < len(actions):
                action = actions[at[rank]]
                if action.kind in PAIRS:
                    sent_at[mirrored(action)] = clock[rank]
                elif action.kind in PAIRS.values():
                    if action not in sent_at:
                        break
                    clock[rank] = max(clock[rank], sent_at[action])
                else:
                    clock[rank] += cost[action.kind]
                at[rank] += 1
                moved = True
    assert at == [len(actions) for actions in lists]
    return max(clock)


def missing_inputs(lists: Lists, shape: PipelineShape) -> list[str]:
    """Actions before something that they need where they stand in the list of their rank."""
    wrong = []
    for rank, actions in enumerate(lists):
        done: set[Action] = set()
        for action in actions:
            needs = {"F": [], "B": ["F"], "W": ["B"], "SEND_F": ["F"], "SEND_B": ["B"]}.get(action.kind, [])
            needed = [Action(kind, action.microbatch, action.chunk) for kind in needs]
            before = action.chunk + {"F": -1, "B": 1}.get(action.kind, shape.chunks)
            if 0 <= before < shape.chunks:
                here = shape.rank_of(before) == rank
                kind, chunk = (action.kind, before) if here else (f"RECV_{action.kind}", action.chunk)
                needed.append(Action(kind, action.microbatch, chunk))
            wrong += [f"rank {rank}: {action} before {need}" for need in needed if need not in done]
            done.add(action)
    return wrong


def out_of_order(lists: Lists) -> list[str]:
    """Receives that would get another message: on a channel, messages come in the order in which they were sent.

    A channel is a pair of ranks and a direction of travel (F, B): the messages on it bear no names.
    """
    channels: dict[tuple[int, int, str], deque[Action]] = defaultdict(deque)
    for rank, actions in enumerate(lists):
        for action in actions:
            if action.kind in PAIRS:
                channels[rank, other_end(action) % len(lists), PAIRS[action.kind]].append(mirrored(action))
    wrong = []
    for rank, actions in enumerate(lists):
        for action in actions:
            if action.kind in PAIRS.values():
                queue = channels[other_end(action) % len(lists), rank, action.kind]
                message = queue.popleft() if queue else None
                if message != action:
                    wrong.append(f"rank {rank}: {action} gets {message}")
    return wrong + [f"never received: {action}" for queue in channels.values() for action in queue]


def text(actions: Sequence[Action]) -> str:
    return " ".join(map(str, actions))


def test_the_schedules_are_those_tested_here() -> None:
    assert set(SCHEDULES) == set(NAMES)
    assert len(list(shapes("interleaved"))) == 172 and len(list(shapes("zb-h1"))) == 136


@every_schedule
def test_every_computation_and_transfer_stands_once(name: str) -> None:
    for shape in shapes(name):
        for rank, actions in enumerate(cached(name, shape)):
            expected = []
            for chunk in range(rank, shape.chunks, shape.pp):
                kinds = set(kinds_of(name))
                if shape.pp > 1 and chunk > 0:
                    kinds |= {"RECV_F", "SEND_B"} if "B" in kinds else {"RECV_F"}
                if shape.pp > 1 and chunk < shape.chunks - 1:
                    kinds |= {"SEND_F", "RECV_B"} if "B" in kinds else {"SEND_F"}
                expected += [Action(kind, m, chunk) for kind in kinds for m in range(shape.microbatches)]
            assert sorted(actions) == sorted(expected), f"{shape} rank {rank}"


@every_schedule
def test_blocking_transfers_cannot_deadlock(name: str) -> None:
    for shape in shapes(name):
        _, stuck = run_blocking(cached(name, shape), costs(name))
        assert stuck == [], shape


@every_schedule
def test_every_input_is_there(name: str) -> None:
    for shape in shapes(name):
        assert missing_inputs(cached(name, shape), shape) == [], shape


@every_schedule
def test_messages_without_names_are_received_in_the_order_of_sending(name: str) -> None:
    for shape in shapes(name):
        assert out_of_order(cached(name, shape)) == [], shape


@every_schedule
def test_makespan_is_the_theoretical_one(name: str) -> None:
    for shape in shapes(name):
        pp, m, v = shape.pp, shape.microbatches, shape.virtual_stages
        expected = {
            "gpipe": (m + pp - 1) * 3,
            "1f1b": (m + pp - 1) * 3,
            "interleaved": (m * v + pp - 1) * 3,
            # With fewer micro-batches than ranks: F and B on the last rank, the way there and back, and one W.
            "zb-h1": 3 * m + pp - 1 if m >= pp else 2 * m + 2 * (pp - 1) + 1,
            # With fewer micro-batches than ranks: the first through all chunks, then the others behind it.
            "forward": m * v + pp - 1 if m >= pp else pp * v + m - 1,
        }[name]
        assert makespan(name, shape) == expected, shape
        assert run_buffered(cached(name, shape), costs(name)) == expected, f"{shape}: a receive stands too early"
        assert math.isclose(bubble(name, shape), bubble_theory(name, shape), abs_tol=1e-12), shape


def test_what_the_papers_say_of_the_bubble() -> None:
    for name in ("gpipe", "1f1b"):
        assert bubble_theory(name, PipelineShape(4, 8)) == 3 / 8
    assert bubble_theory("interleaved", PipelineShape(4, 8, 2)) == 3 / 8 / 2
    for pp in range(2, 9):
        for m in range(pp, 18):  # the third of ZB-H1 holds from m = pp on; below, it is less of a gain
            third = bubble_theory("1f1b", PipelineShape(pp, m)) / 3
            assert math.isclose(bubble_theory("zb-h1", PipelineShape(pp, m)), third)
        for m in range(1, pp):
            shape = PipelineShape(pp, m)
            assert bubble_theory("1f1b", shape) / 3 < bubble_theory("zb-h1", shape) < bubble_theory("1f1b", shape)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_blocking_transfers_cost_these_nothing(name: str) -> None:
    for shape in shapes(name):
        blocking, _ = run_blocking(cached(name, shape), costs(name))
        assert blocking == makespan(name, shape), shape


@pytest.mark.parametrize("name", TRAINING)
def test_activations_held(name: str) -> None:
    for shape in shapes(name):
        pp, m, v = shape.pp, shape.microbatches, shape.virtual_stages
        for rank, peak in enumerate(peak_in_flight(name, shape)):
            expected = {
                "gpipe": m,
                "1f1b": min(pp - rank, m),
                "interleaved": min(2 * (pp - rank - 1) + (v - 1) * pp + 1, m * v),
                "zb-h1": min(pp - rank, m),
            }[name]
            assert peak.activations == expected, f"{shape} rank {rank}"
            if name in SPLIT_BACKWARD:  # no rank beyond the first rank of 1F1B
                assert (peak.weight_inputs, peak.together) == (min(rank + 1, m), min(pp, m)), f"{shape} rank {rank}"
            else:
                assert (peak.weight_inputs, peak.together) == (0, peak.activations), f"{shape} rank {rank}"


@every_schedule
def test_gradients_are_accumulated_in_the_order_of_the_micro_batches(name: str) -> None:
    for shape in shapes(name):
        for rank, actions in enumerate(cached(name, shape)):
            for chunk in range(rank, shape.chunks, shape.pp):
                for kind in kinds_of(name):
                    order = [a.microbatch for a in actions if (a.kind, a.chunk) == (kind, chunk)]
                    assert order == list(range(shape.microbatches)), f"{shape} chunk {chunk}: {kind}"


def test_one_stage_is_a_program_without_transfers() -> None:
    assert text(program("1f1b", PipelineShape(1, 3))[0]) == "F0@0 B0@0 F1@0 B1@0 F2@0 B2@0"
    assert text(program("gpipe", PipelineShape(1, 2))[0]) == "F0@0 F1@0 B0@0 B1@0"
    assert text(program("zb-h1", PipelineShape(1, 2))[0]) == "F0@0 B0@0 W0@0 F1@0 B1@0 W1@0"
    assert text(program("interleaved", PipelineShape(1, 1, 2))[0]) == "F0@0 F0@1 B0@1 B0@0"
    assert text(program("forward", PipelineShape(1, 1, 2))[0]) == "F0@0 F0@1"


def test_1f1b_on_two_stages_as_in_the_paper() -> None:
    first, last = program("1f1b", PipelineShape(2, 2))
    assert text(first) == "F0@0 SEND_F0@0 F1@0 SEND_F1@0 RECV_B0@0 B0@0 RECV_B1@0 B1@0"
    assert text(last) == "RECV_F0@1 F0@1 RECV_F1@1 B0@1 SEND_B0@1 F1@1 B1@1 SEND_B1@1"


def test_interleaved_on_two_ranks() -> None:
    first, last = program("interleaved", PipelineShape(2, 2, 2))
    assert text([a for a in first if a.kind in "FB"]) == "F0@0 F1@0 F0@2 F1@2 B0@2 B1@2 B0@0 B1@0"
    assert text([a for a in last if a.kind in "FB"]) == "F0@1 F1@1 F0@3 B0@3 F1@3 B1@3 B0@1 B1@1"
    assert [str(a) for a in first if a.kind.startswith("RECV")] == [
        "RECV_F0@2", "RECV_F1@2", "RECV_B0@2", "RECV_B1@2", "RECV_B0@0", "RECV_B1@0"
    ]  # fmt: skip


def test_zb_h1_keeps_its_weight_gradients_for_the_end() -> None:
    first, last = program("zb-h1", PipelineShape(2, 3))
    assert text([a for a in first if a.kind in "FBW"]) == "F0@0 F1@0 B0@0 W0@0 F2@0 B1@0 W1@0 B2@0 W2@0"
    assert text([a for a in last if a.kind in "FBW"]) == "F0@1 B0@1 F1@1 B1@1 W0@1 F2@1 B2@1 W1@1 W2@1"


def test_forward_puts_what_is_left_over_into_the_last_group() -> None:
    first, _ = program("forward", PipelineShape(2, 5, 2))
    assert text([a for a in first if a.kind == "F"]) == "F0@0 F1@0 F0@2 F1@2 F2@0 F3@0 F4@0 F2@2 F3@2 F4@2"


def test_a_program_is_made_once_and_cannot_be_changed() -> None:
    made = program("1f1b", PipelineShape(2, 4))
    assert program("1f1b", PipelineShape(2, 4)) is made
    assert isinstance(made, tuple) and all(isinstance(actions, tuple) for actions in made)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("interleaved", PipelineShape(4, 6, 2), "6 micro-batches over pp=4 .* multiple of pp; use 4 or 8, or .* 1f1b"),
        ("interleaved", PipelineShape(4, 3, 2), "3 micro-batches over pp=4 .* use 4, or"),
        ("1f1b", PipelineShape(2, 2, 2), "schedule 1f1b: 2 virtual stages; it takes 1, forward or interleaved"),
        ("zb-h1", PipelineShape(2, 2, 3), "schedule zb-h1: 3 virtual stages; it takes 1"),
    ],
)
def test_a_shape_that_a_schedule_does_not_take(name: str, shape: PipelineShape, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        program(name, shape)
    with pytest.raises(AssertionError, match="microbatches=0"):
        PipelineShape(1, 0)


@pytest.mark.parametrize(("kinds", "stuck"), [("BF", "{0: 'B0@0', 1: 'B0@1'}"), ("FWB", "{0: 'W0@0', 1: 'W0@1'}")])
def test_a_schedule_that_can_never_run_is_named(kinds: str, stuck: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def upside_down(shape: PipelineShape, rank: int) -> list[Action]:
        return [Action(kind, 0, rank) for kind in kinds]  # type: ignore[arg-type]

    monkeypatch.setitem(SCHEDULES, "upside-down", upside_down)
    with pytest.raises(ValueError, match=rf"'upside-down' with .*pp=2.* can never run: waiting on {re.escape(stuck)}"):
        program("upside-down", PipelineShape(2, 1))


def test_the_checks_above_can_fail() -> None:
    shape = PipelineShape(2, 2)
    first, last = (list(actions) for actions in program("1f1b", shape))
    swapped = [[first[1], first[0], *first[2:]], last]
    assert missing_inputs(swapped, shape) == ["rank 0: SEND_F0@0 before F0@0"]
    assert missing_inputs([first, last[1:]], shape) == ["rank 1: F0@1 before RECV_F0@1"]
    assert missing_inputs([[Action("W", 0, 0), Action("B", 0, 0)]], PipelineShape(1, 1)) == [
        "rank 0: W0@0 before B0@0", "rank 0: B0@0 before F0@0"
    ]  # fmt: skip
    assert missing_inputs([[Action("F", 0, 1)]], PipelineShape(1, 1, 2)) == ["rank 0: F0@1 before F0@0"]

    both_send = [[Action("SEND_F", 0, 0), Action("RECV_B", 0, 0)], [Action("SEND_B", 0, 1), Action("RECV_F", 0, 1)]]
    assert run_blocking(both_send, {"F": 1}) == (0, [Action("SEND_F", 0, 0), Action("SEND_B", 0, 1)])
    assert out_of_order(both_send) == []

    crossed = [[Action("SEND_F", 0, 0), Action("SEND_F", 1, 0)], [Action("RECV_F", 1, 1), Action("RECV_F", 0, 1)]]
    assert out_of_order(crossed) == ["rank 1: RECV_F1@1 gets RECV_F0@1", "rank 1: RECV_F0@1 gets RECV_F1@1"]
    assert out_of_order([crossed[0], crossed[1][1:]]) == ["never received: RECV_F1@1"]

    early = [[Action("F", 0, 0), Action("SEND_F", 0, 0)], [Action("RECV_F", 0, 1), Action("F", 0, 1)]]
    assert run_buffered(early, {"F": 1}) == 2
    assert peak_in_flight("1f1b", PipelineShape(2, 2))[0] == InFlight(activations=2, weight_inputs=0, together=2)
