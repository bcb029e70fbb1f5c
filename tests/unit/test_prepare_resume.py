"""Preparing through kills, on several nodes at once, on full disks and with inputs that change."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_helpers import small_tokenizer, text_of, write_jsonl

from llama_dist.cli import main
from llama_dist.data import merge, units
from llama_dist.data.claims import Claims
from llama_dist.data.inputs import list_inputs
from llama_dist.data.prepare import Node, Prepared, prepare
from llama_dist.data.rows import Reading
from llama_dist.data.shards import Shards, verify
from llama_dist.errors import RunError, UserError
from llama_dist.files import HashingFile

UNIT_BYTES = 4000
SYSTEM_CALLS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")
KILLS = 20


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with two inputs of some units and one of no text."""
    monkeypatch.chdir(tmp_path)
    small_tokenizer()  # now, and not in each child
    (tmp_path / "in").mkdir()
    for k in (0, 1):
        write_jsonl(tmp_path / f"in/{k}.jsonl", [text_of(100 * k + i) for i in range(60)])
    write_jsonl(tmp_path / "in/2.jsonl", [""])
    return tmp_path


def make(**settings: Any) -> Prepared:
    settings = {"workers": 1, "unit_bytes": UNIT_BYTES, **settings}
    return prepare(["in"], small_tokenizer(), "out", **settings)


def content(folder: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() if file.is_file() else b"" for file in Path(folder).iterdir()}


def undisturbed() -> dict[str, bytes]:
    make()
    whole = content("out")
    shutil.rmtree("out")
    assert len(whole) > 10
    return whole


def in_child(work: Callable[[], object]) -> int:
    """The pid of a copy of this process that does it, and ends with status 0 if that went well."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return child


def status_of(child: int) -> int:
    """The exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(step: int) -> Callable[[], None]:
    """Makes the shards, but is killed before the `step`-th change in the file system, or in the middle of it."""

    def work() -> None:
        steps = 0

        def count() -> bool:
            nonlocal steps
            steps += 1
            return steps == step

        def audit(event: str, args: tuple[object, ...]) -> None:
            if event in SYSTEM_CALLS and "out" in str(args[0]) and count():
                os.kill(os.getpid(), signal.SIGKILL)

        write = HashingFile.write

        def half(file: HashingFile, data: Any) -> None:
            if count():
                write(file, memoryview(data).cast("B")[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            write(file, data)

        HashingFile.write = half  # type: ignore[method-assign]
        sys.addaudithook(audit)
        make()
        Path("steps").write_text(str(steps))

    return work


def finished_files() -> dict[tuple[int, int], str]:
    """(inode, time of change) of the token files of finished units."""
    found = [file for file in Path(".").glob("out.partial/*/*.bin") if ".work-" not in str(file)]
    found += Path(".").glob("out.partial/*.bin")
    return {(file.stat().st_ino, file.stat().st_mtime_ns): str(file) for file in found}


def test_killed_at_any_point_it_goes_on_to_the_same(here: Path) -> None:
    whole = undisturbed()
    assert status_of(in_child(killed_at(0))) == 0
    steps = int(Path("steps").read_text())
    shutil.rmtree("out")
    generator = random.Random(4)
    kept = 0
    for round in range(KILLS):  # one in each twentieth of the way, and then a second on what was left
        step = generator.randrange(1 + steps * round // KILLS, 1 + steps * (round + 1) // KILLS)
        assert status_of(in_child(killed_at(step))) == -signal.SIGKILL, step
        before = finished_files()
        status_of(in_child(killed_at(generator.randrange(1, steps))))
        make()
        after = {(file.stat().st_ino, file.stat().st_mtime_ns) for file in Path("out").glob("*.bin")}
        assert before.keys() <= after, "a finished unit was done again"
        assert content("out") == whole, step
        assert sorted(os.listdir()) == ["in", "out", "steps"]
        kept += len(before)
        shutil.rmtree("out")
    assert kept > 3 * KILLS


def wait_until(there: Callable[[], object]) -> None:
    started_at = time.monotonic()
    while not there():
        assert time.monotonic() - started_at < 60, "it did not happen"
        time.sleep(0.005)


def units_done() -> int:
    return len([path for path in Path("out.partial").glob("?????") if path.is_dir()])


def test_workers_end_with_a_killed_parent(here: Path) -> None:
    whole = undisturbed()
    child = in_child(lambda: make(workers=2))
    wait_until(units_done)
    os.kill(child, signal.SIGKILL)
    status_of(child)
    make(workers=2)
    assert content("out") == whole


@pytest.mark.parametrize("nodes", [[Node(0, 2), Node(1, 2)], [Node(), Node(), Node()]], ids=["nodes", "by mistake"])
def test_several_at_once_share_the_work(here: Path, nodes: list[Node]) -> None:
    """Also a second run that somebody starts by mistake: whoever comes later takes what is left."""
    whole = undisturbed()
    children = [in_child(lambda node=node: make(node=node)) for node in nodes]
    assert [status_of(child) for child in children] == [0] * len(nodes)
    assert content("out") == whole
    assert sorted(os.listdir()) == ["in", "out"]


def test_what_a_dead_node_had_begun_is_done_by_another(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = undisturbed()
    encode = units._encode

    def hang(unit: units.Unit, *rest: Any) -> None:
        Path("begun").touch()
        time.sleep(600)
        encode(unit, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(units, "_encode", hang)
        stuck = in_child(lambda: make(node=Node(1, 2)))
    wait_until(Path("begun").exists)
    said: list[str] = []

    def work() -> None:
        make(node=Node(0, 2), say=said.append, say_every=0.0)
        Path("said").write_text(str(said))

    other = in_child(work)
    wait_until(lambda: units_done() == count_of_units() - 1)
    time.sleep(0.3)
    assert os.waitpid(other, os.WNOHANG) == (0, 0), "it must wait for the unit that another process is at"
    os.kill(stuck, signal.SIGKILL)
    assert (status_of(stuck), status_of(other)) == (-signal.SIGKILL, 0)
    assert "waiting for the last 1 unit, on which other processes work" in Path("said").read_text()
    assert content("out") == whole


def count_of_units() -> int:
    return len(units.units_of(list_inputs(["in"]), UNIT_BYTES))


def test_a_folder_without_locks_is_right_too(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = undisturbed()

    def no_locks(claims: Claims, *_: object, **__: object) -> bool:
        claims.shared = False
        return True

    monkeypatch.setattr(Claims, "_lock", no_locks)
    children = [in_child(lambda rank=rank: make(node=Node(rank, 2))) for rank in (0, 1, 1)]
    statuses = [status_of(child) for child in children]
    assert 0 in statuses
    verify("out")
    assert {name: data for name, data in content("out").items() if name in whole} == whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_signal_leaves_it_to_go_on_from_and_says_so(here: Path, number: signal.Signals, workers: int) -> None:
    whole = undisturbed()

    def work() -> None:
        try:
            make(workers=workers)
        except RunError as error:
            Path("said").write_text(str(error))

    child = in_child(work)
    wait_until(lambda: units_done() >= 2)
    os.kill(child, number)
    assert status_of(child) == 0
    said = Path("said").read_text()
    found = re.fullmatch(
        rf"prepare: interrupted \({number.name}\); (\d+) of (\d+) units of the work are done and kept in out.partial: "
        "the same call goes on",
        said,
    )
    assert found and 2 <= int(found[1]) <= int(found[2]), said
    assert not list(Path("out.partial").glob("*.work-*"))
    make()
    assert content("out") == whole


def test_inputs_that_changed_since_are_refused(here: Path) -> None:
    whole = undisturbed()
    assert status_of(in_child(stopped_after_two)) == 0
    source = Path("in/1.jsonl")
    original = source.read_bytes()
    for changed, message in (
        (original[:-5] + b"###\"}\n"[:5], "in/1.jsonl is not the same in/1.jsonl as then"),
        (original + b'{"text": "more"}\n', r"in/1.jsonl has [\d,]+ bytes, in/1.jsonl had"),
    ):
        source.write_bytes(changed)
        with pytest.raises(UserError, match=f"out.partial: was begun with other inputs: {message}.*to begin anew"):
            make()
    source.write_bytes(original)
    write_jsonl(Path("in/3.jsonl"), ["more"])
    with pytest.raises(UserError, match="other inputs: 4 of them, 3 then"):
        make()
    os.unlink("in/3.jsonl")
    with pytest.raises(UserError, match="other settings of reading: text 'text' then, 'body' now"):
        make(reading=Reading(text="body"))
    make()
    assert content("out") == whole


def stopped_after_two() -> None:
    """Two units are done, then the disk is full."""
    encode = units._encode

    def full(unit: units.Unit, *rest: Any) -> None:
        if unit.number == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        encode(unit, *rest)

    units._encode = full
    with pytest.raises(UserError, match="out.partial: No space left on device; make room and call again; 2 of"):
        make()


def test_inputs_that_change_meanwhile_are_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = units._encode

    def change(unit: units.Unit, *rest: Any) -> None:
        encode(unit, *rest)
        with open("in/0.jsonl", "ab") as file:
            file.write(b"\n")

    monkeypatch.setattr(units, "_encode", change)
    with pytest.raises(UserError, match="in/0.jsonl has .* it changed while it was read; remove out.partial"):
        make()
    assert not Path("out").exists()


def test_a_full_disk_is_told_and_what_is_done_is_kept(here: Path) -> None:
    whole = undisturbed()
    assert status_of(in_child(stopped_after_two)) == 0
    assert units_done() == 2
    make(workers=2)
    assert content("out") == whole


def test_what_others_put_there_is_not_touched(here: Path) -> None:
    Path("out.partial").mkdir()
    Path("out.partial/precious.txt").write_text("mine")
    with pytest.raises(UserError, match="out.partial: is there and is no work that was begun; remove it, or choose"):
        make()
    assert Path("out.partial/precious.txt").read_text() == "mine"


def test_damaged_work_is_named(here: Path) -> None:
    assert status_of(in_child(stopped_after_two)) == 0
    Path("out.partial/00001/record.json").write_text("{")
    with pytest.raises(UserError, match="00001/record.json: is damaged .*; remove out.partial/00001 and prepare again"):
        make()
    shutil.rmtree("out.partial/00001")
    with open("out.partial/00000/00000.bin", "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"00000.bin: has \d+ bytes, expected \d+; it was changed since"):
        make()


def test_the_result_is_whole(here: Path) -> None:
    manifest = make(workers=2).manifest
    verify("out")
    assert manifest.skipped == {"empty": 1}
    shards = Shards("out")
    assert (shards.num_documents, shards.num_tokens) == (manifest.documents, manifest.tokens)
    for name, entry in manifest.files.items():
        if name.endswith(".bin"):
            pair = Shards(Path("out") / name.removesuffix(".bin"))
            assert (pair.num_tokens, pair.num_documents) == (entry["tokens"], entry["documents"])


@pytest.mark.parametrize("content", [b"", b"PK", b"\0" * 99])
def test_damaged_counts_of_a_unit_are_named(here: Path, content: bytes) -> None:
    (here / "00000").mkdir()
    (here / "00000/counts.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"00000/counts\.npz: is damaged .* remove .*00000 and prepare again"):
        merge._sum_of_counts(here, [units.Unit(0, (), 0)], 10)


def test_a_place_that_cannot_be_written_to_is_one_line(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As root nothing is forbidden, so a file stands where a folder is wanted."""
    (here / "file").write_text("")
    source = write_jsonl(here / "a.jsonl", [text_of(i) for i in range(3)])
    words = [str(source), "--tokenizer", str(small_tokenizer()), "--out", "file/below/out"]
    assert main(["prepare", *words]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "file/below" in said and "Not a directory" in said
