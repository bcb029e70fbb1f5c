"""The checkpoint that a start of a run goes on from, of those on shared storage and those on the nodes."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from llama_dist.checkpoint.local_level import LocalLevel, Spread
from llama_dist.checkpoint.nodes import find_nodes
from llama_dist.checkpoint.places import LocalPlace
from llama_dist.checkpoint.retention import step_of
from llama_dist.checkpoint.store import Checkpoint, newest_valid
from llama_dist.config import RunConfig
from llama_dist.errors import UserError
from llama_dist.files import write_file
from llama_dist.runtime import Groups
from llama_dist.train.saves import place_of

RUN_ID = "RUN_ID"


@dataclass(frozen=True)
class Found:
    """What to go on from (None: the run begins), if it lies on the nodes where, and what was wrong with newer ones."""

    checkpoint: Checkpoint | None
    spread: Spread | None
    passed_over: list[str]


def find_newest(run: RunConfig, level: LocalLevel | None, *, group: dist.ProcessGroup) -> Found:
    """The newest checkpoint that is whole. Collective.

    Raises UserError when there are checkpoints and none is whole: that is never a fresh start.
    """
    full = run.checkpoint.verify == "full"
    local, wrong = level.newest(full=full) if level else (None, [])
    place = place_of(run)
    newest = [max(map(step_of, place.names()), default=-1)]
    dist.broadcast_object_list(newest, src=0, group=group)
    step = -1 if local is None else local.checkpoint.position.step
    if step > newest[0]:
        return Found(local.checkpoint, local, wrong)
    try:
        checkpoint, passed_over = newest_valid(place, group=group, full=full)
    except UserError as error:
        if local is None:
            raise
        return Found(local.checkpoint, local, [*wrong, str(error)])
    if step > (-1 if checkpoint is None else checkpoint.position.step):
        return Found(local.checkpoint, local, [*wrong, *passed_over])
    return Found(checkpoint, None, [*wrong, *passed_over])


def open_local_level(run: RunConfig, groups: Groups) -> LocalLevel | None:
    """The node-local level of a run that has one. Collective.

    Its folder on each node is named by the run folder's own id, so that a run begun anew under an old name never goes
    on from the old one's state.
    """
    settings = run.checkpoint.local
    if settings is None:
        return None
    box = [_run_id(Path(run.folder)) if dist.get_rank(groups.control) == 0 else None]
    dist.broadcast_object_list(box, src=0, group=groups.control)
    folder = Path(os.path.expandvars(settings.folder)).expanduser() / f"{run.name}-{box[0]}"
    nodes = find_nodes(folder, group=groups.control)
    return LocalLevel(LocalPlace(folder), nodes, groups.saves, settings.keep, settings.neighbour)


def _run_id(folder: Path) -> str:
    path = folder / RUN_ID
    if not path.exists():
        write_file(path, secrets.token_hex(4).encode())
    return path.read_text().strip()
