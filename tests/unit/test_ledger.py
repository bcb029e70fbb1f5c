"""The ledger: appended and never rewritten; of all starts of a run only the newest is the run."""

from __future__ import annotations

import json
import shutil
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llama_dist.files import read_json_lines
from llama_dist.train.ledger import open_ledger


def read(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def test_every_start_takes_the_next_number_and_says_who_holds_it(tmp_path: Path) -> None:
    ledgers = [open_ledger(tmp_path / "run", config={"name": f"start {i}"}) for i in range(3)]
    assert [ledger.attempt for ledger in ledgers] == [1, 2, 3]
    files = sorted((tmp_path / "run/attempts").iterdir())
    assert [file.name for file in files] == ["00001.json", "00002.json", "00003.json"]
    second = json.loads(files[1].read_text())
    assert second["config"] == {"name": "start 1"}
    assert (second["host"], second["pid"]) == (socket.gethostname(), os.getpid())


def test_events_of_all_attempts_stand_in_order(tmp_path: Path) -> None:
    first = open_ledger(tmp_path)
    first.write("start", zero=3)
    first.write("save", step=10)
    second = open_ledger(tmp_path)
    second.write("start", zero=1)
    lines = read(tmp_path)
    assert [(line["attempt"], line["event"]) for line in lines] == [(1, "start"), (1, "save"), (2, "start")]
    assert lines[1]["step"] == 10 and lines[2]["zero"] == 1
    times = [line["at"] for line in lines]
    assert times == sorted(times, key=float)


def test_the_newest_start_has_no_successor_and_older_ones_hear_of_it(tmp_path: Path) -> None:
    first = open_ledger(tmp_path)
    assert first.successor() is None
    second = open_ledger(tmp_path)
    third = open_ledger(tmp_path)
    assert third.successor() is None
    who = f"attempt 3 on host {socket.gethostname()} (pid {os.getpid()})"
    assert first.successor() == second.successor() == who


def test_starts_at_the_same_time_get_different_numbers(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        ledgers = list(pool.map(lambda _: open_ledger(tmp_path), range(40)))
    assert sorted(ledger.attempt for ledger in ledgers) == list(range(1, 41))


def test_a_foreign_file_among_the_attempts_is_passed_over(tmp_path: Path) -> None:
    open_ledger(tmp_path)
    (tmp_path / "attempts/notes.json").write_text("{}")
    assert open_ledger(tmp_path).attempt == 2


def test_an_event_after_a_line_that_a_kill_cut_short_stands_alone(tmp_path: Path) -> None:
    open_ledger(tmp_path).write("start")
    path = tmp_path / "ledger.jsonl"
    path.write_text(path.read_text() + '{"at": 1.5, "attem')
    open_ledger(tmp_path).write("resume", step=7)
    assert [event["event"] for event in read_json_lines(path)] == ["start", "resume"]


@pytest.mark.parametrize("name", ["00077.json", "00099.json"])
@pytest.mark.parametrize("text", ["", "not JSON", "[1]", "{}"])
def test_a_record_that_says_nothing_still_counts_as_a_start(tmp_path: Path, name: str, text: str) -> None:
    ledger = open_ledger(tmp_path)
    (tmp_path / "attempts" / name).write_text(text)
    assert ledger.successor() == f"attempt {int(name[:5])}"


def test_what_is_no_attempt_or_is_gone_ends_no_run(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    for name in ("77.json", "\u00b2.json", "00x77.json"):
        (tmp_path / "attempts" / name).write_text("{}")
    assert ledger.successor() is None
    shutil.rmtree(tmp_path / "attempts")
    assert ledger.successor() is None
