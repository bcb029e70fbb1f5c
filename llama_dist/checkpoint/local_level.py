"""Frequent saves to the disks of the nodes, each file also on the next node; resumed from what is left of them.

In every node's folder lies the same checkpoint with the files of its own ranks and copies of those of the node
before; the manifest is whole in each. A checkpoint of this level is there while each file is on some node. Saves to
shared storage are rarer, and are what survives the loss of two neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llama_dist.checkpoint.dcp import NotFiniteError, write_pieces
from llama_dist.checkpoint.nodes import Nodes, Transfer, exchange
from llama_dist.checkpoint.pieces import Piece
from llama_dist.checkpoint.places import LocalPlace
from llama_dist.checkpoint.plan import file_name
from llama_dist.checkpoint.retention import doomed
from llama_dist.checkpoint.saving import RECORD, agree, describe_record, read_record, record_of
from llama_dist.checkpoint.store import (
    Checkpoint,
    Position,
    folder_name,
    needed_ranks,
    read_checkpoint,
    seal,
    verify_files,
)

Files = dict[str, tuple[str, frozenset[str]]]  # of each checkpoint: its manifest's checksum, and the files that are good


@dataclass(frozen=True)
class Spread:
    """A checkpoint whose files lie on the nodes, and of each node those that are good there."""

    checkpoint: Checkpoint
    holders: tuple[frozenset[str], ...]


@dataclass(frozen=True)
class LocalLevel:
    """The node-local level of one rank of a run. `place` is in a folder that belongs to this run and this node alone."""

    place: LocalPlace
    nodes: Nodes
    group: dist.ProcessGroup
    keep: int
    neighbour: bool

    def save(
        self,
        position: Position,
        pieces: Sequence[Piece],
        *,
        state: dict[str, Any],
        attempt: int,
        may_commit: Callable[[], str | None],
    ) -> str:
        """As `save_checkpoint`, on every node's disk. Collective."""
        name = folder_name(position)
        draft, where = self.place.draft(name, attempt), f"{self.place.where}/{name}"
        rank, record, problem = self.nodes.rank, bytes(RECORD), None
        try:
            self.place.begin(draft)
            with self.place.create(draft, file_name(rank)) as file:
                write_pieces(pieces, file)
            record = record_of(file)
        except (OSError, NotFiniteError) as error:
            problem = error
        try:
            agree(problem, where, self.group)
            records = self._all_records(record)
            agree(self._copy(draft, records), where, self.group)
            reason = may_commit()
            agree(OSError(reason) if reason else None, where, self.group)
            agree(self._commit(draft, name, position, state, records), where, self.group)
        except Exception:
            if self.nodes.is_leader:
                self.place.abandon(draft)
            raise
        return name

    def prune(self) -> list[str]:
        """Delete all but the newest on this node, where this rank does that. Raises OSError."""
        names = self.place.names() if self.nodes.is_leader else []
        gone = doomed(names, keep=self.keep)
        for name in gone:
            self.place.discard(name)
        return gone

    def _all_records(self, record: bytes) -> list[bytes]:
        everyone = torch.empty(len(record) * dist.get_world_size(self.group), dtype=torch.uint8)
        mine = torch.frombuffer(bytearray(record), dtype=torch.uint8)
        dist.all_gather_into_tensor(everyone, mine, group=self.group)
        return [row.numpy().tobytes() for row in everyone.view(-1, RECORD)]

    def _copy(self, draft: str, records: list[bytes]) -> OSError | None:
        """Send this rank's file to its keeper, and take those that this rank keeps."""
        if not self.neighbour:
            return None
        transfers = [
            Transfer(file_name(rank), describe_record(record)["bytes"], rank, keeper)
            for rank, record in enumerate(records)
            if (keeper := self.nodes.keeper(rank)) is not None
        ]
        kept = self.nodes.kept_by(self.nodes.rank)
        mine = file_name(self.nodes.rank)
        expected = {file_name(rank): records[rank] for rank in kept}
        return self._receive(draft, transfers, {mine: self.place.folder / draft / mine}, expected)

    def _receive(
        self, draft: str, transfers: Sequence[Transfer], paths: dict[str, Path], expected: dict[str, bytes]
    ) -> OSError | None:
        """Do this rank's part of transfers into a draft; what goes wrong is returned when the others are served."""
        problem, sinks = None, dict.fromkeys(expected)
        try:
            with ExitStack() as stack:
                try:
                    for file in expected:
                        sinks[file] = stack.enter_context(self.place.create(draft, file))
                except OSError as error:
                    problem = error
                exchange(transfers, paths, sinks, group=self.group)
        except OSError as error:
            problem = error
        for file, sink in sinks.items():
            if problem is None and record_of(sink) != expected[file]:
                problem = OSError(f"{self.place.where}/{draft}/{file}: the copy is not what was sent")
        return problem

    def _commit(
        self, draft: str, name: str, position: Position, state: dict[str, Any], records: list[bytes]
    ) -> OSError | None:
        if not self.nodes.is_leader:
            return None
        files = {file_name(rank): describe_record(record) for rank, record in enumerate(records)}
        body = {"step": position.step, "samples": position.samples, **state, "files": files}
        try:
            self.place.commit(draft, name, seal(body))
        except OSError as error:
            return error
        return None

    def newest(self, *, full: bool = True) -> tuple[Spread | None, list[str]]:
        """The newest checkpoint of which every file is good on some node, and what is wrong with newer ones. Collective."""
        mine, problems = self._good_files(full)
        everyone: list[tuple[Files, list[str]]] = [({}, [])] * dist.get_world_size(self.group)
        dist.all_gather_object(everyone, (mine, problems), group=self.group)
        passed_over = sorted({text for _, texts in everyone for text in texts})
        found = {(name, files[name][0]) for files, _ in everyone for name in files}
        for name, seal_ in sorted(found, reverse=True):
            of = [f[name][1] if f.get(name, ("",))[0] == seal_ else frozenset() for f, _ in everyone]
            checkpoint = self._manifest_of(name, source=next(rank for rank, files in enumerate(of) if files))
            holders = tuple(frozenset().union(*(of[rank] for rank in ranks)) for ranks in self.nodes.ranks)
            missing = sorted(set(checkpoint.manifest["files"]) - frozenset().union(*holders))
            if not missing:
                return Spread(checkpoint, holders), passed_over
            passed_over.append(f"{checkpoint}: on no node is there a good {', '.join(missing[:5])}")
        return None, passed_over

    def _good_files(self, full: bool) -> tuple[Files, list[str]]:
        """Of each checkpoint on this node, the files that this rank has found good: ranks of a node share the work."""
        good: Files = {}
        problems: list[str] = []
        for name in self.place.names():
            try:
                checkpoint = read_checkpoint(self.place, name)
            except ValueError as error:
                problems.append(str(error))
                continue
            here = [f for f in sorted(checkpoint.manifest["files"]) if (self.place.folder / name / f).exists()]
            mine = here[self.nodes.own.index(self.nodes.rank) :: len(self.nodes.own)]
            wrong = verify_files(checkpoint, mine, full=full)
            problems += wrong.values()
            good[name] = checkpoint.manifest["seal"], frozenset(mine) - frozenset(wrong)
        return good, problems

    def _manifest_of(self, name: str, *, source: int) -> Checkpoint:
        """The manifest of a checkpoint that the rank `source` has. Collective."""
        box: list[Any] = [None]
        if source == self.nodes.rank:
            checkpoint = read_checkpoint(self.place, name)
            box = [(checkpoint.position, checkpoint.manifest)]
        dist.broadcast_object_list(box, src=source, group=self.group)
        return Checkpoint(self.place, name, *box[0])

    def gather(self, spread: Spread, pieces: Sequence[Piece], *, attempt: int) -> None:
        """Bring the files that ranks of this node have to read to this node. Collective. Raises SaveError on all ranks."""
        checkpoint = spread.checkpoint
        files = checkpoint.manifest["files"]
        needed: list[set[int]] = [set()] * dist.get_world_size(self.group)
        dist.all_gather_object(needed, needed_ranks(checkpoint, pieces), group=self.group)
        transfers = []
        for ranks, held in zip(self.nodes.ranks, spread.holders, strict=True):
            wanted = {file_name(one) for rank in ranks for one in needed[rank]} - held
            for file in sorted(wanted):
                source = next(i for i, held in enumerate(spread.holders) if file in held)
                transfers.append(Transfer(file, files[file]["bytes"], self.nodes.ranks[source][0], ranks[0]))
        agree(self._take(checkpoint, transfers, attempt), str(checkpoint), self.group)

    def _take(self, checkpoint: Checkpoint, transfers: list[Transfer], attempt: int) -> OSError | None:
        """Receive into a draft, and put what came where the checkpoint lies."""
        name, folder = checkpoint.name, self.place.folder / checkpoint.name
        draft, records = self.place.draft(name, attempt), checkpoint.manifest["files"]
        mine = [t.file for t in transfers if t.target == self.nodes.rank]
        paths = {t.file: folder / t.file for t in transfers if t.source == self.nodes.rank}
        problem = None
        try:
            if mine:
                self.place.begin(draft)
        except OSError as error:
            problem = error
        problem = self._receive(draft, transfers, paths, {f: read_record(records[f]) for f in mine}) or problem
        try:
            if mine and not problem and folder.exists():
                for file in mine:
                    (self.place.folder / draft / file).rename(folder / file)
            elif mine and not problem:
                body = {key: value for key, value in checkpoint.manifest.items() if key not in ("format", "seal")}
                self.place.commit(draft, name, seal(body))
        except OSError as error:
            problem = error
        if mine:
            self.place.abandon(draft)
        return problem
