"""A save: every rank writes its file, all agree, the coordinator commits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from llama_dist.checkpoint.dcp import NotFiniteError, write_pieces
from llama_dist.checkpoint.pieces import Piece
from llama_dist.checkpoint.places import Place
from llama_dist.checkpoint.plan import file_name
from llama_dist.checkpoint.store import Position, folder_name, seal
from llama_dist.files import HashingFile
from llama_dist.runtime import gather_texts

RECORD = 8 + 16  # bytes: a file's size and checksum, all that the coordinator hears of a rank


class SaveError(RuntimeError):
    """A save failed and was given up; the checkpoints before it are untouched."""


def save_checkpoint(
    place: Place,
    position: Position,
    pieces: Sequence[Piece],
    *,
    state: dict[str, Any],
    attempt: int,
    group: dist.ProcessGroup | None,
    may_commit: Callable[[], str | None] = lambda: None,
) -> str:
    """Write and commit a checkpoint, and return its name; collective over `group`, all ranks (None: one process).

    `pieces` are those that the rank owns, in the order of `SavedLayout.held`; `state` goes into the manifest. The
    coordinator commits unless `may_commit` gives a reason against it. Raises SaveError on every rank, with the reason,
    when any rank could not write, and NotFiniteError when the state has diverged.
    """
    name = folder_name(position)
    draft, record, problem = place.draft(name, attempt), b"", None
    rank = dist.get_rank(group) if group is not None else 0
    try:
        place.begin(draft)
        with place.create(draft, file_name(rank)) as file:
            write_pieces(pieces, file)
        record = record_of(file)
    except (OSError, NotFiniteError) as error:
        problem = error
    where = f"{place.where}/{name}"
    try:
        agree(problem, where, group)
        records = _gather(record, group)
        problem = None
        if rank == 0:
            try:
                reason = may_commit()
                if reason:
                    raise OSError(reason)
                files = {file_name(r): describe_record(one) for r, one in enumerate(records)}
                place.commit(draft, name, seal({"step": position.step, "samples": position.samples, **state, "files": files}))
            except OSError as error:
                problem = error
        agree(problem, where, group)
    except (SaveError, NotFiniteError):
        if rank == 0:
            place.abandon(draft)
        raise
    return name


def record_of(file: HashingFile) -> bytes:
    """A written file's size and checksum."""
    return file.size.to_bytes(8, "little") + bytes.fromhex(file.checksum)


def describe_record(record: bytes) -> dict[str, Any]:
    """A record as manifests have it."""
    return {"bytes": int.from_bytes(record[:8], "little"), "xxh3_128": record[8:].hex()}


def read_record(described: Mapping[str, Any]) -> bytes:
    """The record that a manifest describes."""
    return int(described["bytes"]).to_bytes(8, "little") + bytes.fromhex(described["xxh3_128"])


def agree(problem: Exception | None, where: str, group: dist.ProcessGroup | None) -> None:
    """Raise on every rank where any has a problem. Texts travel only then: a number is all that most saves need."""
    odd = torch.tensor([problem is not None, isinstance(problem, NotFiniteError)], dtype=torch.int32)
    if group is not None:
        dist.all_reduce(odd, group=group)
    if not odd[0]:
        return
    texts = gather_texts([str(problem)] if problem else [], group=group)
    kind = NotFiniteError if odd[1] else SaveError
    raise kind(f"{where}: not saved: {'; '.join(texts)}") from problem


def _gather(record: bytes, group: dist.ProcessGroup | None) -> list[bytes]:
    """All ranks' records, on the coordinator."""
    if group is None:
        return [record]
    mine = torch.frombuffer(bytearray(record), dtype=torch.uint8)
    everyone = None
    if dist.get_rank(group) == 0:
        everyone = [torch.empty(RECORD, dtype=torch.uint8) for _ in range(dist.get_world_size(group))]
    dist.gather(mine, everyone, dst=0, group=group)
    return [one.numpy().tobytes() for one in everyone or []]
