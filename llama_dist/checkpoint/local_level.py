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

    def newest(self, *, full: bool = True) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint of which all files are good on some node, and what is wrong with newer ones. Collective.

        Afterwards the files that ranks of this node have to read are on this node, if it is to be loaded: see `gather`.
        """
        mine, problems = self._good_files(full)
        everyone: list[Files] = [{}] * dist.get_world_size(self.group)
        dist.all_gather_object(everyone, mine, group=self.group)
        candidates = sorted({name for files in everyone for name in files}, reverse=True)
        texts: list[list[str]] = [[]] * len(everyone)
        dist.all_gather_object(texts, problems, group=self.group)
        passed_over = sorted({text for one in texts for text in one})
        for name in candidates:
            seals = {files[name][0] for files in everyone if name in files}
            for seal_ in sorted(seals):
                have = frozenset().union(*(f[name][1] for f in everyone if name in f and f[name][0] == seal_))
                checkpoint = self._manifest_of(name, seal_, everyone)
                missing = set(checkpoint.manifest["files"]) - have
                if not missing:
                    return checkpoint, passed_over
                passed_over.append(f"{checkpoint}: no node has {', '.join(sorted(missing)[:5])}")
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

    def _manifest_of(self, name: str, seal_: str, everyone: list[Files]) -> Checkpoint:
        """The manifest of a checkpoint, from the first rank that has it. Collective."""
        source = next(rank for rank, files in enumerate(everyone) if name in files and files[name][0] == seal_)
        box: list[Any] = [None]
        if source == self.nodes.rank:
            checkpoint = read_checkpoint(self.place, name)
            box = [(checkpoint.position, checkpoint.manifest)]
        dist.broadcast_object_list(box, src=source, group=self.group)
        return Checkpoint(self.place, name, *box[0])

    def gather(self, checkpoint: Checkpoint, pieces: Sequence[Piece], *, attempt: int) -> None:
        """Bring the files that ranks of this node have to read to this node. Collective. Raises SaveError on all ranks."""
        name, files = checkpoint.name, checkpoint.manifest["files"]
        here = {f for f in files if (self.place.folder / name / f).exists()} if self.nodes.is_leader else set()
        needed = {file_name(rank) for rank in needed_ranks(checkpoint, pieces)}
        everyone: list[tuple[set[str], set[str]]] = [(set(), set())] * dist.get_world_size(self.group)
        dist.all_gather_object(everyone, (here, needed), group=self.group)
        transfers = []
        for ranks in self.nodes.ranks:
            wanted = set().union(*(everyone[rank][1] for rank in ranks)) - everyone[ranks[0]][0]
            for file in sorted(wanted):
                source = next(rank for rank, (have, _) in enumerate(everyone) if file in have)
                transfers.append(Transfer(file, files[file]["bytes"], source, ranks[0]))
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
