"""The run's ledger and its attempts: what happened in which start of the run, append-only across requeues."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_dist.files import append_lines, sync_folder

LEDGER = "ledger.jsonl"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ledger:
    """One start of a run. Every start takes the next attempt number, and only the newest may write (fencing)."""

    folder: Path
    attempt: int

    def write(self, event: str, **fields: Any) -> None:
        """Append one JSON line; flushed to disk, since it is what remains after a crash.

        A disk that takes no line is not a reason to end the run: the line goes to the log instead.
        """
        line = {"at": round(time.time(), 3), "attempt": self.attempt, "event": event, **fields}
        try:
            with append_lines(self.folder / LEDGER) as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            log.error("%s: %s; lost: %s", self.folder / LEDGER, error.strerror, json.dumps(line))

    def successor(self) -> str | None:
        """Who has begun a later attempt of this run and so has taken it over, or None."""
        newest = max(_attempts(self.folder), default=0)
        if newest <= self.attempt:  # less where somebody has deleted the record of this one
            return None
        try:
            owner = json.loads(_attempt_file(self.folder, newest).read_text())
            return f"attempt {newest} on host {owner['host']} (pid {owner['pid']})"
        except (OSError, ValueError, KeyError, TypeError):  # being written
            return f"attempt {newest}"


def open_ledger(folder: Path, **fields: Any) -> Ledger:
    """Take the next attempt number of a run folder and record who holds it, with `fields`."""
    (folder / "attempts").mkdir(parents=True, exist_ok=True)
    while True:
        attempt = max(_attempts(folder), default=0) + 1
        try:
            # Exclusive creation: of two runs that start at once, one takes the number and the other the next.
            with open(_attempt_file(folder, attempt), "x", encoding="utf-8") as file:
                json.dump({"host": socket.gethostname(), "pid": os.getpid(), "at": time.time(), **fields}, file)
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:
            continue
        sync_folder(folder / "attempts")
        return Ledger(folder, attempt)


def _attempt_file(folder: Path, attempt: int) -> Path:
    return folder / "attempts" / f"{attempt:05d}.json"


def _attempts(folder: Path) -> list[int]:
    files = (folder / "attempts").glob("*.json")
    return [int(file.stem) for file in files if re.fullmatch(r"[0-9]{5,}", file.stem)]
