"""Layouts: rank and coord are the same thing, groups partition the world, stages share the layers out well."""

from __future__ import annotations

import itertools

import pytest

from llama_dist.layout import Coord, Layout, split_layers

SIZES = (1, 2, 3)
LAYOUTS = [Layout(dp, tp, pp, cp) for dp, tp, pp, cp in itertools.product(SIZES, SIZES, SIZES, SIZES)]
AXES = ("dp", "tp", "pp", "cp")


def test_rank_and_coord_are_inverse() -> None:
    for layout in LAYOUTS:
        coords = [layout.coord(rank) for rank in range(layout.world)]
        assert [layout.rank(coord) for coord in coords] == list(range(layout.world))
        assert set(coords) == {
            Coord(dp=dp, tp=tp, pp=pp, cp=cp)
            for dp in range(layout.dp)
            for tp in range(layout.tp)
            for pp in range(layout.pp)
            for cp in range(layout.cp)
        }


@pytest.mark.parametrize(
    ("kind", "along"),
    [
        ("data_parallel_groups", ("dp", "cp")),
        ("tensor_groups", ("tp",)),
        ("context_groups", ("cp",)),
        ("replica_groups", ("pp", "tp")),
        ("pipeline_groups", ("pp",)),
    ],
)
def test_the_groups_of_each_axis_partition_the_world(kind: str, along: tuple[str, ...]) -> None:
    """A group's ranks run along its axes, first axis slowest, and agree on all the others."""
    others = [axis for axis in AXES if axis not in along]
    for layout in LAYOUTS:
        groups: list[list[int]] = getattr(layout, kind)()
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world))
        for group in groups:
            coords = [layout.coord(rank) for rank in group]
            places = [tuple(getattr(coord, axis) for axis in along) for coord in coords]
            assert places == list(itertools.product(*(range(getattr(layout, axis)) for axis in along)))
            assert len({tuple(getattr(coord, axis) for axis in others) for coord in coords}) == 1


def test_tensor_parallel_ranks_are_neighbours_and_stages_farthest_apart() -> None:
    layout = Layout(dp=2, tp=2, pp=2, cp=2)
    assert layout.rank(Coord(dp=0, tp=1, pp=0, cp=0)) == 1
    assert layout.rank(Coord(dp=0, tp=0, pp=0, cp=1)) == 2
    assert layout.rank(Coord(dp=1, tp=0, pp=0, cp=0)) == 4
    assert layout.rank(Coord(dp=0, tp=0, pp=1, cp=0)) == 8


@pytest.mark.parametrize(
    ("tp", "kv_heads", "groups"),
    [
        (1, 4, [[0], [1]]),
        (2, 4, [[0], [1], [2], [3]]),
        (4, 4, [[0], [1], [2], [3], [4], [5], [6], [7]]),
        (4, 2, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (4, 1, [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ],
)
def test_ranks_that_hold_the_same_key_value_heads(tp: int, kv_heads: int, groups: list[list[int]]) -> None:
    assert Layout(2, tp).kv_groups(kv_heads) == groups
    assert Layout(1, tp, 2).kv_groups(kv_heads) == groups


def test_first_and_last_stage_share_a_tied_embedding() -> None:
    assert Layout(2, 1, 3).tied_groups() == [[0, 4], [1, 5]]
    assert Layout(1, 2, 2).tied_groups() == [[0, 2], [1, 3]]
    assert Layout(4, 2).tied_groups() == []


@pytest.mark.parametrize("layout", [Layout(1, 1, pp) for pp in range(1, 10)] + [Layout(2, 2, 3, 2)], ids=str)
def test_edges_lead_round_every_pipeline(layout: Layout) -> None:
    edges = layout.pipeline_edges()
    rings = [list(zip(ranks, ranks[1:] + ranks[:1], strict=True)) for ranks in layout.pipeline_groups()]
    assert sorted(edges) == sorted(edge for ring in rings for edge in ring if edge[0] != edge[1])
    # Played by ranks that take their edges in this order and each wait for the other end, all is done in three rounds.
    queues = {rank: [edge for edge in edges if rank in edge] for rank in range(layout.world)}
    for _ in range(3):
        ready = {queue[0] for queue in queues.values() if queue and all(queues[r][0] == queue[0] for r in queue[0])}
        queues = {rank: queue[1:] if queue and queue[0] in ready else queue for rank, queue in queues.items()}
    assert not any(queues.values())


def test_a_rank_outside_the_world_is_a_defect() -> None:
    with pytest.raises(AssertionError, match="rank 4 is outside a layout of 4 ranks"):
        Layout(2, 2).coord(4)


@pytest.mark.parametrize(("num_layers", "stages"), [(1, 1), (4, 4), (7, 3), (32, 8), (80, 16), (5, 4)])
@pytest.mark.parametrize("last", [0.0, 1.7, 4.0])
def test_layers_are_consecutive_and_no_stage_is_empty(num_layers: int, stages: int, last: float) -> None:
    parts = split_layers(num_layers, stages=stages, last_cost=last)
    assert [layer for part in parts for layer in part] == list(range(num_layers))
    assert len(parts) == stages and all(len(part) for part in parts)


def compositions(total: int, parts: int) -> list[tuple[int, ...]]:
    """All ways to write `total` as an ordered sum of `parts` positive numbers."""
    if parts == 1:
        return [(total,)]
    return [(n, *rest) for n in range(1, total - parts + 2) for rest in compositions(total - n, parts - 1)]


@pytest.mark.parametrize(("num_layers", "stages"), [(6, 2), (9, 3), (8, 4)])
@pytest.mark.parametrize("last", [0.0, 1.7, 3.2])
def test_the_dearest_stage_costs_as_little_as_it_can(num_layers: int, stages: int, last: float) -> None:
    def dearest(counts: tuple[int, ...]) -> float:
        return max(n + last * (i == stages - 1) for i, n in enumerate(counts))

    found = tuple(len(part) for part in split_layers(num_layers, stages=stages, last_cost=last))
    assert dearest(found) == min(map(dearest, compositions(num_layers, stages)))


def test_more_stages_than_layers_is_a_defect() -> None:
    with pytest.raises(AssertionError, match="2 layers cannot fill 3 stages"):
        split_layers(2, stages=3)
