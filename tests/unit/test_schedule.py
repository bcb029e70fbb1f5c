"""Every schedule, at many shapes: complete, free of deadlock, as lean and as fast as theory says."""

from __future__ import annotations

import pytest

from llama_dist.pipeline.schedule import COST, SCHEDULES, Action, PipelineShape, program

SHAPES = [PipelineShape(pp, m) for pp in (1, 2, 3, 4, 8) for m in (1, 2, 3, 4, 5, 8, 13, 16)]
EVERY = [(name, shape) for name in SCHEDULES for shape in SHAPES]
PAIRS = {"SEND_F": "RECV_F", "SEND_B": "RECV_B"}


def every_schedule_and_shape() -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("name", "shape"), EVERY, ids=[f"{n}-{s.pp}x{s.microbatches}" for n, s in EVERY])


def peer_of(action: Action) -> int:
    """The stage at the other end of a transfer."""
    return action.chunk + (1 if action.kind in ("SEND_F", "RECV_B") else -1)


def run_blocking(lists: list[list[Action]]) -> tuple[int, list[Action]]:
    """Run the lists with sends that wait for their receiver: (makespan, what each rank was stuck at).

    Compute takes its COST and a transfer nothing, but it takes place when both ends have come to it and not before.
    """
    at = [0] * len(lists)
    clock = [0] * len(lists)
    while True:
        moved = False
        for rank, actions in enumerate(lists):
            if at[rank] == len(actions):
                continue
            action = actions[at[rank]]
            if action.kind in COST:
                clock[rank] += COST[action.kind]
                at[rank] += 1
                moved = True
            elif action.kind in PAIRS:
                peer = peer_of(action)
                wanted = Action(PAIRS[action.kind], action.microbatch, peer)
                if at[peer] < len(lists[peer]) and lists[peer][at[peer]] == wanted:
                    clock[rank] = clock[peer] = max(clock[rank], clock[peer])
                    at[rank] += 1
                    at[peer] += 1
                    moved = True
        if not moved:
            return max(clock), [actions[i] for actions, i in zip(lists, at, strict=True) if i < len(actions)]


def check_inputs(lists: list[list[Action]]) -> list[str]:
    """Computations whose inputs the rank does not hold yet where they stand in its list."""
    wrong = []
    for rank, actions in enumerate(lists):
        done: set[Action] = set()
        for action in actions:
            m, last = action.microbatch, len(lists) - 1
            needs: list[Action] = []
            if action.kind == "F" and rank > 0:
                needs = [Action("RECV_F", m, rank)]
            elif action.kind == "B":
                needs = [Action("F", m, rank)] + ([Action("RECV_B", m, rank)] if rank < last else [])
            elif action.kind.startswith("SEND"):
                needs = [Action("F" if action.kind == "SEND_F" else "B", m, rank)]
            wrong += [f"rank {rank}: {action} before {need}" for need in needs if need not in done]
            done.add(action)
    return wrong


def peak_in_flight(actions: list[Action]) -> int:
    """The most micro-batches whose activations a rank holds at a time."""
    held = peak = 0
    for action in actions:
        held += {"F": 1, "B": -1}.get(action.kind, 0)
        peak = max(peak, held)
    return peak


@every_schedule_and_shape()
def test_every_computation_and_transfer_stands_once(name: str, shape: PipelineShape) -> None:
    for rank, actions in enumerate(program(name, shape)):
        kinds = {"F", "B"}
        kinds |= {"SEND_F", "RECV_B"} if rank < shape.pp - 1 else set()
        kinds |= {"RECV_F", "SEND_B"} if rank > 0 else set()
        expected = [Action(kind, m, rank) for kind in kinds for m in range(shape.microbatches)]
        assert sorted(actions) == sorted(expected)


@every_schedule_and_shape()
def test_blocking_transfers_cannot_deadlock_and_every_input_is_there(name: str, shape: PipelineShape) -> None:
    lists = program(name, shape)
    _, stuck = run_blocking(lists)
    assert stuck == []
    assert check_inputs(lists) == []


@every_schedule_and_shape()
def test_makespan_is_the_theoretical_one(name: str, shape: PipelineShape) -> None:
    makespan, _ = run_blocking(program(name, shape))
    # Filling and draining the pipeline costs pp - 1 forwards and backwards; the rest is work without a gap.
    assert makespan == (shape.microbatches + shape.pp - 1) * (COST["F"] + COST["B"])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_activations_held(shape: PipelineShape) -> None:
    for rank, actions in enumerate(program("1f1b", shape)):
        assert peak_in_flight(actions) == min(shape.pp - rank, shape.microbatches)
    for actions in program("gpipe", shape):
        assert peak_in_flight(actions) == shape.microbatches


@every_schedule_and_shape()
def test_gradients_are_accumulated_in_the_order_of_the_micro_batches(name: str, shape: PipelineShape) -> None:
    for actions in program(name, shape):
        for kind in ("F", "B"):
            assert [a.microbatch for a in actions if a.kind == kind] == list(range(shape.microbatches))


def test_one_stage_is_a_program_without_transfers() -> None:
    assert " ".join(map(str, program("1f1b", PipelineShape(1, 3))[0])) == "F0@0 B0@0 F1@0 B1@0 F2@0 B2@0"
    assert " ".join(map(str, program("gpipe", PipelineShape(1, 2))[0])) == "F0@0 F1@0 B0@0 B1@0"


def test_1f1b_on_two_stages_as_in_the_paper() -> None:
    first, last = program("1f1b", PipelineShape(2, 2))
    assert " ".join(map(str, first)) == (
        "F0@0 SEND_F0@0 F1@0 SEND_F1@0 RECV_B0@0 B0@0 RECV_B1@0 B1@0"
    )
    assert " ".join(map(str, last)) == (
        "RECV_F0@1 F0@1 RECV_F1@1 B0@1 SEND_B0@1 F1@1 B1@1 SEND_B1@1"
    )


def test_a_schedule_that_can_never_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def backward_first(shape: PipelineShape, rank: int) -> list[Action]:
        return [Action("B", 0, rank), Action("F", 0, rank)]

    monkeypatch.setitem(SCHEDULES, "upside-down", backward_first)
    with pytest.raises(ValueError, match=r"'upside-down' with .*pp=2.* can never run: .*\{0: 'B0@0', 1: 'B0@1'\}"):
        program("upside-down", PipelineShape(2, 1))


def test_the_checks_above_can_fail() -> None:
    lists = program("1f1b", PipelineShape(2, 2))
    swapped = [[lists[0][1], lists[0][0], *lists[0][2:]], lists[1]]
    assert check_inputs(swapped) == ["rank 0: SEND_F0@0 before F0@0"]
    both_send = [[Action("SEND_F", 0, 0), Action("RECV_B", 0, 0)], [Action("SEND_B", 0, 1), Action("RECV_F", 0, 1)]]
    assert run_blocking(both_send) == (0, [Action("SEND_F", 0, 0), Action("SEND_B", 0, 1)])
