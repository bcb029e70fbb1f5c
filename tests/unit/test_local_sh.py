"""launch/local.sh without a run: its ranks are played by a script that takes the place of the interpreter."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
STARTS = 4
RANK = """\
import os, pathlib, socket, sys, time
home, port = pathlib.Path(sys.argv[1]), int(os.environ["MASTER_PORT"])
if os.environ["RANK"] == "0":
    (home / str(port)).touch()
    while not (home / "go").exists():
        time.sleep(0.02)
    # As torch listens.
    meeting = socket.socket()
    meeting.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    meeting.bind(("", port))
    meeting.listen()
    meeting.accept()
else:
    while socket.socket().connect_ex(("127.0.0.1", port)):
        time.sleep(0.02)
"""


def test_starts_at_once_each_hold_a_port_until_rank_0_listens(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    stub = tmp_path / "python"
    stub.write_text(
        f'#!/bin/sh\n[ "$1" = -m ] && exec {sys.executable} {tmp_path}/rank.py {tmp_path}\nexec {sys.executable} "$@"\n'
    )
    stub.chmod(0o755)
    env = {name: value for name, value in os.environ.items() if name != "MASTER_PORT"} | {"PYTHON": str(stub)}
    command = [str(REPO / "launch" / "local.sh"), "2", "config.yaml"]
    runs = [subprocess.Popen(command, env=env, start_new_session=True) for _ in range(STARTS)]
    try:
        deadline = time.monotonic() + 60
        while len(ports := [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]) < STARTS:
            assert time.monotonic() < deadline, f"{STARTS} starts have {len(ports)} ports between them"
            time.sleep(0.05)
        for port in ports:
            with socket.socket() as other:
                assert other.connect_ex(("127.0.0.1", port)), "nobody listens yet"
            with socket.socket() as other:
                try:
                    other.bind(("127.0.0.1", port))
                except OSError:
                    continue  # it is held
                raise AssertionError(f"port {port} could be taken before rank 0 listened")
        (tmp_path / "go").touch()
        assert [run.wait(timeout=60) for run in runs] == [0] * STARTS
    finally:
        (tmp_path / "go").touch()
        for run in runs:
            run.terminate()
            run.wait()
