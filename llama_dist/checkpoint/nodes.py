"""Which ranks share a node's disk, and files sent from node to node."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from llama_dist.files import HashingFile

BLOCK = 16 << 20  # bytes under way at a time


@dataclass(frozen=True)
class Nodes:
    """The ranks of each node, ascending, in the order of their first ranks; nodes that share a folder are one."""

    ranks: tuple[tuple[int, ...], ...]
    rank: int

    @property
    def index(self) -> int:
        """Of this rank's node."""
        return next(i for i, ranks in enumerate(self.ranks) if self.rank in ranks)

    @property
    def own(self) -> tuple[int, ...]:
        return self.ranks[self.index]

    @property
    def is_leader(self) -> bool:
        """Whether this rank does what a node does once."""
        return self.own[0] == self.rank

    def keeper(self, rank: int) -> int | None:
        """Who keeps a copy of a rank's file: a rank of the next node; None where there is no other node."""
        home = next(i for i, ranks in enumerate(self.ranks) if rank in ranks)
        if len(self.ranks) == 1:
            return None
        other = self.ranks[(home + 1) % len(self.ranks)]
        return other[self.ranks[home].index(rank) % len(other)]

    def kept_by(self, keeper: int) -> list[int]:
        """The ranks of whose files `keeper` keeps copies."""
        return [rank for ranks in self.ranks for rank in ranks if self.keeper(rank) == keeper]


def find_nodes(folder: Path, *, group: dist.ProcessGroup) -> Nodes:
    """Ranks on the same host that name the same folder share a node. Collective."""
    mine = (socket.gethostname(), str(folder.absolute()))
    everyone: list[tuple[str, str]] = [("", "")] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    nodes: dict[tuple[str, str], list[int]] = {}
    for rank, home in enumerate(everyone):
        nodes.setdefault(home, []).append(rank)
    return Nodes(tuple(map(tuple, nodes.values())), dist.get_rank(group))


@dataclass(frozen=True)
class Transfer:
    """A file of `size` bytes goes from one rank to another."""

    file: str
    size: int
    source: int
    target: int


def exchange(
    transfers: Sequence[Transfer], paths: dict[str, Path], sinks: dict[str, HashingFile | None], *, group: dist.ProcessGroup
) -> None:
    """Do this rank's part of some transfers, all at once: a block of each is under way at a time. Collective.

    `paths`: where the files are that this rank sends; `sinks`: the files that it receives, None: to be
    thrown away. A file that cannot be read or written to is sent and taken on to its end, and the error raised
    afterwards: the others do not know.
    """
    rank = dist.get_rank(group)
    sends = [(t, paths[t.file]) for t in transfers if t.source == rank]
    takes = [(t, sinks[t.file]) for t in transfers if t.target == rank]
    problem: OSError | None = None
    for start in range(0, max((t.size for t, _ in sends + takes), default=0), BLOCK):
        work, taken = [], []
        for transfer, path in sends:
            size = min(BLOCK, transfer.size - start)
            if size > 0:
                block = torch.zeros(size, dtype=torch.uint8)
                problem = _read(path, start, block) or problem
                work.append((dist.isend(block, transfer.target, group=group), block))
        for transfer, sink in takes:
            size = min(BLOCK, transfer.size - start)
            if size > 0:
                block = torch.empty(size, dtype=torch.uint8)
                taken.append((dist.irecv(block, transfer.source, group=group), block, sink))
        for request, block, sink in taken:
            request.wait()
            try:
                if problem is None and sink is not None:
                    sink.write(block.numpy())
            except OSError as error:
                problem = error
        for request, _ in work:
            request.wait()
    if problem:
        raise problem


def _read(path: Path, start: int, block: torch.Tensor) -> OSError | None:
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            file.readinto(memoryview(block.numpy()))
    except OSError as error:
        return error
    return None
