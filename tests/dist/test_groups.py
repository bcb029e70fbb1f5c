"""Process groups of real ranks: who is in which, and that each group and channel carries its own messages."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from workers import pool

from llama_dist.layout import Layout
from llama_dist.runtime import Channel, Environment, Runtime, start_runtime

CASES = [
    (Layout(3), 4),
    (Layout(1, 1, 3), 4),
    (Layout(2, 2), 2),
    (Layout(1, 4), 2),
    (Layout(1, 2, 2), 1),
    (Layout(1, 1, 4), 4),
    (Layout(1, 1, 2, 2), 4),
    (Layout(1, 2, 2, 2), 2),
    (Layout(2, 1, 4), 4),
    (Layout(1, 8), 2),
]


def start(layout: Layout, kv_heads: int) -> Runtime:
    rank = dist.get_rank()
    environment = Environment("env", rank, layout.world, rank, "127.0.0.1", 0)
    cpu = torch.device("cpu")
    return start_runtime(environment, layout, device=cpu, timeout_seconds=60, kv_heads=kv_heads)


def members(layout: Layout, kv_heads: int) -> dict[str, list[int] | None]:
    """For each of this rank's groups, who answers in it."""
    groups = start(layout, kv_heads).groups
    found: dict[str, list[int] | None] = {}
    for name in ("dp", "tp", "cp", "replica", "pp", "kv", "tied", "control"):
        group = getattr(groups, name)
        if group is None:
            found[name] = None
            continue
        answers = torch.full((dist.get_world_size(group),), -1)
        dist.all_gather_into_tensor(answers, torch.tensor([dist.get_rank()]), group=group)
        found[name] = answers.tolist()
    return found


@pytest.mark.parametrize(("layout", "kv_heads"), CASES, ids=str)
def test_every_group_holds_the_ranks_that_the_layout_says(layout: Layout, kv_heads: int) -> None:
    expected = {
        "dp": layout.data_parallel_groups(),
        "tp": layout.tensor_groups(),
        "cp": layout.context_groups(),
        "replica": layout.replica_groups(),
        "pp": layout.pipeline_groups(),
        "kv": layout.kv_groups(kv_heads),
        "tied": layout.tied_groups(),
        "control": [list(range(layout.world))],
    }
    for rank, found in enumerate(pool(layout.world).run(members, layout, kv_heads)):
        own = {name: next((group for group in groups if rank in group), None) for name, groups in expected.items()}
        assert found == own


def travel(layout: Layout) -> dict[str, list[tuple[int, str, int]]]:
    """What arrives here on each channel when all receives are posted first, each message saying who sent it, and how."""
    channels = start(layout, 4).groups.channels
    assert channels is not None
    ends = (channels.forward_in, channels.forward_out, channels.backward_in, channels.backward_out)
    # What NCCL needs and gloo would not miss: on one communicator a send waits behind a posted receive.
    assert len({channel.group.group_name for channel in ends}) == 4
    came: dict[str, list[tuple[int, str, int]]] = {}
    posted = []
    for way, channel in (("forward", channels.forward_in), ("backward", channels.backward_in)):
        buffers = [torch.zeros(3, dtype=torch.int64) for _ in range(2)]
        posted += [(way, channel, b, dist.irecv(b, channel.peer, group=channel.group)) for b in buffers]
    sent = [
        _send(channel, code=code, number=number)
        for number in range(2)
        for code, channel in ((1, channels.backward_out), (0, channels.forward_out))
    ]
    for way, channel, buffer, work in posted:
        work.wait()
        sender, code, number = buffer.tolist()
        came.setdefault(way, []).append((sender, ("forward", "backward")[code], number))
        assert sender == channel.peer
    for work, _ in sent:
        work.wait()
    return came


def _send(channel: Channel, *, code: int, number: int) -> tuple[dist.Work, torch.Tensor]:
    message = torch.tensor([dist.get_rank(), code, number])
    return dist.isend(message, channel.peer, group=channel.group), message


@pytest.mark.parametrize("layout", [Layout(1, 1, 3), Layout(1, 1, 4), Layout(1, 2, 2), Layout(2, 1, 4)], ids=str)
def test_messages_of_either_direction_keep_apart_all_round_the_pipeline(layout: Layout) -> None:
    """With two stages all four channels are between the same two ranks."""
    before, after = {}, {}
    for ranks in layout.pipeline_groups():
        for stage, rank in enumerate(ranks):
            before[rank], after[rank] = ranks[stage - 1], ranks[(stage + 1) % layout.pp]
    for rank, came in enumerate(pool(layout.world).run(travel, layout)):
        assert came["forward"] == [(before[rank], "forward", number) for number in range(2)]
        assert came["backward"] == [(after[rank], "backward", number) for number in range(2)]
