"""One start of a run at a time, told by the lock of its folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llama_dist.errors import UserError
from llama_dist.train import holding
from llama_dist.train.holding import LOCK, Holding

REPO = Path(__file__).resolve().parents[2]
HOLD = """
import sys
from pathlib import Path
from llama_dist.train.holding import Holding
held = Holding(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def another(folder: Path, job: str | None = None) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the run, until it is killed."""
    environment = {key: value for key, value in os.environ.items() if key != "SLURM_JOB_ID"}
    environment |= {"PYTHONPATH": str(REPO)} | ({"SLURM_JOB_ID": job} if job else {})
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def test_a_second_start_is_refused_with_host_and_process_of_the_first(tmp_path: Path) -> None:
    with another(tmp_path / "run") as process:
        said = json.loads((tmp_path / "run" / LOCK).read_text())
        assert said["pid"] == process.pid
        with pytest.raises(UserError, match=rf"at work on host {said['host']} \(pid {process.pid}\); wait until it has"):
            Holding(tmp_path / "run")
        assert json.loads((tmp_path / "run" / LOCK).read_text()) == said, "the first one's name stays"


def test_a_start_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    with another(tmp_path) as process:
        process.kill()
        process.wait()
        held = Holding(tmp_path)
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    held.close()
    with another(tmp_path):
        pass


def test_the_same_job_takes_over_from_ranks_that_were_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with another(tmp_path, job="17"):
        monkeypatch.setenv("SLURM_JOB_ID", "18")
        with pytest.raises(UserError, match="another start of this run"):
            Holding(tmp_path)
        monkeypatch.setenv("SLURM_JOB_ID", "17")
        Holding(tmp_path).close()


@pytest.mark.parametrize("left", [b"", b"{", b"[1]", b"\xff\xfe"])
def test_a_lock_that_says_nothing_is_one_all_the_same(tmp_path: Path, left: bytes) -> None:
    with another(tmp_path):
        (tmp_path / LOCK).write_bytes(left)
        with pytest.raises(UserError, match=r"host unknown \(pid unknown\)"):
            Holding(tmp_path)


def test_a_file_system_without_locks_refuses_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(next(iter(holding.NO_LOCKS)), "no locks here")

    monkeypatch.setattr(holding.fcntl, "lockf", no_locks)
    Holding(tmp_path).close()
