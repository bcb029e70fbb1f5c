"""One start of a run at a time: whoever holds the folder's lock has the run."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from llama_dist.data.claims import HELD, NO_LOCKS
from llama_dist.errors import UserError
from llama_dist.runtime import gather_texts

LOCK = "LOCK"


class Holding:
    """The lock of a run folder, held until its process ends, however it ends.

    A requeued job may find it held: where a node was cut off, its processes live on for a while. Such a start goes on
    without the lock, and the older one stops at its next step and commits nothing more (see `Ledger.successor`). Any
    other start is refused. Clocks play no part in it.
    """

    def __init__(self, folder: Path) -> None:
        """Raises UserError naming host and process of another start that lives, and OSError for a folder that is odd."""
        folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        job = os.environ.get("SLURM_JOB_ID")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                return  # fencing is left
            if error.errno not in HELD:
                raise
            holder = self._read()
            if job is None or holder.get("job") != job:
                who = f"host {holder.get('host', 'unknown')} (pid {holder.get('pid', 'unknown')})"
                raise UserError(
                    f"{folder}: another start of this run is at work on {who}; wait until it has ended, stop it there, or "
                    "name another `folder`"
                ) from error
            return
        text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "job": job, "at": time.time()})
        os.truncate(self._file, 0)
        os.pwrite(self._file, text.encode(), 0)

    def _read(self) -> dict[str, object]:
        try:
            value = json.loads(os.pread(self._file, 4096, 0))
        except ValueError:  # being written
            return {}
        return value if isinstance(value, dict) else {}

    def close(self) -> None:
        """Let others have the run."""
        os.close(self._file)


@contextmanager
def holding(folder: Path, *, group: dist.ProcessGroup) -> Iterator[None]:
    """Inside, the run is this start's; collective. The coordinator takes the lock, and all ranks hear if it cannot."""
    held, problem = None, []
    if dist.get_rank(group) == 0:
        try:
            held = Holding(folder)
        except OSError as error:
            problem = [f"folder={folder}: cannot be written to: {error}; mend it or name another"]
        except UserError as error:
            problem = [str(error)]
    problems = gather_texts(problem, group=group)
    if problems:
        raise UserError("; ".join(problems))
    try:
        yield
    finally:
        if held:
            held.close()
