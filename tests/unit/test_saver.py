"""Saves in the background: what is on disk is the state at `save`, each save is told once, and nothing is lost."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_helpers import ALONE, State, assert_holds, assert_loads, manifest_state, names_in, pieces_of, state_at

from llama_dist.checkpoint.dcp import NotFiniteError
from llama_dist.checkpoint.pieces import Piece
from llama_dist.checkpoint.places import LocalPlace
from llama_dist.checkpoint.saver import Saved, Saver
from llama_dist.checkpoint.saving import SaveError
from llama_dist.checkpoint.store import Position, read_checkpoint
from llama_dist.files import HashingFile
from llama_dist.train.saves import Saves

PATIENCE = 60  # seconds after which something hangs
NORM = "model.norm.weight"


class Gate:
    """Whoever passes waits until it is open."""

    def __init__(self) -> None:
        self._open, self.reached = threading.Event(), threading.Event()
        self._open.set()

    def close(self) -> None:
        self._open.clear()
        self.reached.clear()

    def open(self) -> None:
        self._open.set()

    def pass_(self) -> None:
        self.reached.set()
        assert self._open.wait(PATIENCE), "nobody opened"


class Disk(LocalPlace):
    """A disk that takes nothing while its gate is closed, and fails as it is told."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.gate = Gate()
        self.problem: Exception | None = None
        self.written: list[tuple[int, int]] = []  # where in memory what was written began and ended

    def create(self, draft: str, file: str) -> HashingFile:
        disk = self

        class File(HashingFile):
            def write(self, data: Any) -> None:
                disk.gate.pass_()
                if disk.problem:
                    raise disk.problem
                begin = data.__array_interface__["data"][0]
                disk.written.append((begin, begin + data.nbytes))
                super().write(data)

        return File(self.folder / draft / file)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "checkpoints")
    yield disk
    disk.gate.open()


def saver_on(disk: Disk, **options: Any) -> Saver:
    return Saver(disk, attempt=1, group=None, **options)


def begin(saver: Saver, step: int, pieces: list[Piece] | None = None, *, wait: bool = False) -> Saved | None:
    pieces = pieces_of(state_at(step)) if pieces is None else pieces
    return saver.save(Position(step, 8 * step), pieces, manifest_state(ALONE, step), wait=wait)


def save_whole(saver: Saver, step: int, pieces: list[Piece] | None = None, *, wait: bool = False) -> Saved:
    assert begin(saver, step, pieces, wait=wait) is None
    saved = saver.finish()
    assert saved is not None
    return saved


def update(pieces: list[Piece], state: State) -> None:
    """What an optimizer does: change the state in place."""
    for piece in pieces:
        piece.data.copy_(state[piece.name][piece.box.slices])


@contextmanager
def in_thread(work: Callable[[], Any]) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield thread
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_the_state_may_change_once_it_is_copied(disk: Disk) -> None:
    saver, pieces = saver_on(disk), pieces_of(state_at(1))
    disk.gate.close()
    begin(saver, 1, pieces)
    saver.before_update()
    for step in range(2, 5):
        update(pieces, state_at(step))
    assert disk.names() == []
    disk.gate.open()
    assert saver.finish().name == "step-00000001"
    assert_loads(disk.folder, {1})
    assert torch.equal(pieces[0].data, state_at(4)[pieces[0].name][pieces[0].box.slices])


def test_an_update_waits_for_the_copy(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    saver, gate, copy = saver_on(disk), Gate(), torch.Tensor.copy_

    def gated(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        gate.pass_()
        return copy(self, *args, **kwargs)

    pieces = pieces_of(state_at(1))
    gate.close()
    monkeypatch.setattr(torch.Tensor, "copy_", gated)
    begin(saver, 1, pieces)
    with in_thread(saver.before_update) as waiting:
        assert gate.reached.wait(PATIENCE)
        waiting.join(0.3)
        assert waiting.is_alive(), "an update may begin although the copy has not ended"
        gate.open()
    monkeypatch.undo()
    update(pieces, state_at(2))
    saved = saver.finish()
    assert saved.blocked > 0.2
    assert_loads(disk.folder, {1})


def test_before_update_waits_for_nothing_where_nothing_is_saved(disk: Disk) -> None:
    saver = saver_on(disk)
    saver.before_update()
    save_whole(saver, 1)
    saver.before_update()
    begin(saver, 2, wait=True)
    saver.before_update()


def test_training_goes_on_while_a_disk_is_slow(disk: Disk) -> None:
    saver, pieces = saver_on(disk), pieces_of(state_at(1))
    disk.gate.close()
    begin(saver, 1, pieces)
    for step in range(2, 52):
        assert saver.poll() is None
        saver.before_update()
        update(pieces, state_at(step))
    threading.Event().wait(0.5)
    disk.gate.open()
    saved = saver.finish()
    assert saved.blocked < saved.seconds - 0.4, "training waited while the disk did"
    assert_loads(disk.folder, {1})


def test_the_next_save_waits_for_the_last(disk: Disk) -> None:
    saver, pieces, told = saver_on(disk), pieces_of(state_at(1)), []
    disk.gate.close()
    begin(saver, 1, pieces)
    saver.before_update()
    update(pieces, state_at(2))
    with in_thread(lambda: told.append(begin(saver, 2, pieces))) as second:
        assert disk.gate.reached.wait(PATIENCE)
        second.join(0.3)
        assert second.is_alive() and told == []
        disk.gate.open()
    assert [saved.name for saved in told] == ["step-00000001"]
    saved = saver.finish()
    assert saved.name == "step-00000002" and saved.blocked > 0.2, "the wait for the first counts"
    assert disk.names() == ["step-00000002", "step-00000001"]
    for name in disk.names():
        assert_holds(read_checkpoint(disk, name))


@pytest.mark.parametrize("wait", [False, True])
def test_a_save_is_told_once(disk: Disk, wait: bool) -> None:
    saver = saver_on(disk)
    assert saver.poll() is None and saver.finish() is None
    begin(saver, 1, wait=wait)
    told = saver.finish()
    assert (told.position, told.name, told.error) == (Position(1, 8), "step-00000001", None)
    assert 0 < told.seconds < PATIENCE and 0 < told.blocked < PATIENCE
    assert saver.poll() is None and saver.finish() is None
    begin(saver, 2, wait=wait)
    assert begin(saver, 3, wait=wait).name == "step-00000002"
    polled = None
    while polled is None:
        polled = saver.poll()
    assert polled.name == "step-00000003"
    assert saver.finish() is None and begin(saver, 4, wait=wait) is None
    assert saver.finish().position.step == 4


def test_a_save_that_is_waited_for_is_on_disk_and_takes_no_memory(disk: Disk) -> None:
    """The last save: nothing is copied, and its thread is this one."""
    saver, pieces = saver_on(disk), pieces_of(state_at(7))
    threads = threading.active_count()
    begin(saver, 7, pieces, wait=True)
    assert threading.active_count() == threads
    assert_loads(disk.folder, {7})
    own = {(piece.data.data_ptr(), piece.data.data_ptr() + piece.data.nbytes) for piece in pieces}
    assert set(disk.written) <= own
    assert saver.finish().name == "step-00000007"


def test_the_memory_of_a_save_is_kept_and_never_grows(disk: Disk) -> None:
    saver, seen = saver_on(disk), []
    for step in range(1, 5):
        save_whole(saver, step)
        seen.append((min(begin for begin, _ in disk.written), max(end for _, end in disk.written)))
        disk.written.clear()
    assert len(set(seen)) == 1, "each save was copied into the same memory"
    assert seen[0][1] - seen[0][0] == ALONE.file_size(0)


# What goes wrong.


@pytest.mark.parametrize("wait", [False, True])
def test_a_full_disk_is_told_and_the_next_save_tries_again(disk: Disk, wait: bool) -> None:
    pruned: list[str] = []
    saver = saver_on(disk, prune=lambda name: pruned.append(name) or [])
    save_whole(saver, 1, wait=wait)
    disk.problem = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    saved = save_whole(saver, 2, wait=wait)
    assert isinstance(saved.error, SaveError) and saved.position.step == 2
    assert "step-00000002: not saved: " in str(saved.error) and os.strerror(errno.ENOSPC) in str(saved.error)
    assert names_in(disk.folder) == ["step-00000001"] and pruned == ["step-00000001"]
    assert saver.finish() is None
    disk.problem = None
    assert save_whole(saver, 3, wait=wait).error is None
    assert_loads(disk.folder, {3})


@pytest.mark.parametrize("wait", [False, True])
def test_a_state_that_diverged_is_told(disk: Disk, wait: bool) -> None:
    saver, state = saver_on(disk), state_at(1)
    state[NORM][2] = torch.nan
    saved = save_whole(saver, 1, pieces_of(state), wait=wait)
    assert isinstance(saved.error, NotFiniteError) and NORM in str(saved.error)
    assert names_in(disk.folder) == []


@pytest.mark.parametrize("wait", [False, True])
def test_what_may_not_be_committed_is_told_and_nothing_stays(disk: Disk, wait: bool) -> None:
    pruned: list[str] = []
    answers = iter([None, "attempt 2 on host b (pid 7) has taken over"])
    saver = saver_on(disk, may_commit=lambda: next(answers), prune=lambda name: pruned.append(name) or [])
    save_whole(saver, 1, wait=wait)
    saved = save_whole(saver, 2, wait=wait)
    assert isinstance(saved.error, SaveError) and "(pid 7) has taken over" in str(saved.error)
    assert names_in(disk.folder) == ["step-00000001"] and pruned == ["step-00000001"]


def ask_poll(saver: Saver) -> None:
    while True:
        saver.poll()


CALLS: dict[str, Callable[[Saver], Any]] = {
    "poll": ask_poll,
    "finish": Saver.finish,
    "save": lambda saver: begin(saver, 9),
    "save and wait": lambda saver: begin(saver, 9, wait=True),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("where", ["write", "commit", "prune"])
def test_what_nobody_expects_reaches_the_caller_once(disk: Disk, call: str, where: str) -> None:
    errors: list[Exception] = [RuntimeError("a defect")]

    def fail(*args: str) -> Any:
        if errors:
            raise errors.pop()
        return None if where == "commit" else []

    saver = saver_on(disk, **{"commit": {"may_commit": fail}, "prune": {"prune": fail}}.get(where, {}))
    disk.problem = errors.pop() if where == "write" else None
    begin(saver, 1)
    with pytest.raises(RuntimeError, match="a defect"):
        CALLS[call](saver)
    disk.problem = None
    assert saver.finish() is None and saver.poll() is None
    assert save_whole(saver, 2).error is None
    assert_loads(disk.folder, {2})


def test_an_error_of_the_copy_lets_the_update_go_on_and_is_raised(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no memory")

    saver, pieces = saver_on(disk), pieces_of(state_at(1))
    monkeypatch.setattr(torch.Tensor, "copy_", fail)
    begin(saver, 1, pieces)
    with in_thread(saver.before_update):
        pass
    with pytest.raises(RuntimeError, match="no memory"):
        saver.finish()
    assert disk.names() == []


def test_old_checkpoints_that_stay_are_no_failure_of_the_save(disk: Disk) -> None:
    def prune(name: str) -> list[str]:
        if name == "step-00000002":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return ["step-00000000"]

    saver = saver_on(disk, prune=prune)
    first, second = save_whole(saver, 1), save_whole(saver, 2)
    assert (first.pruned, first.prune_problem) == (("step-00000000",), None)
    assert (second.pruned, second.error) == ((), None) and os.strerror(errno.EIO) in second.prune_problem
    assert disk.names() == ["step-00000002", "step-00000001"]


ENDING = """
import sys, time
from pathlib import Path
from checkpoint_helpers import ALONE, manifest_state, pieces_of, state_at
from llama_dist.checkpoint.places import LocalPlace
from llama_dist.checkpoint.saver import Saver
from llama_dist.checkpoint.store import Position
from llama_dist.files import HashingFile

write = HashingFile.write

def slowly(self, data):
    time.sleep(0.5)
    write(self, data)

HashingFile.write = slowly
saver = Saver(LocalPlace(sys.argv[1]), attempt=1, group=None)
saver.save(Position(5, 40), pieces_of(state_at(5)), manifest_state(ALONE, 5), wait=False)
assert not list(Path(sys.argv[1]).glob("step-00000005"))
print("at its end", flush=True)
"""


@pytest.mark.parametrize(("end", "status"), [("pass", 0), ("sys.exit(3)", 3), ("raise RuntimeError('x')", 1)])
def test_a_process_that_ends_waits_for_the_save_under_way(tmp_path: Path, end: str, status: int) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", ENDING + end, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (ended.returncode, ended.stdout) == (status, "at its end\n"), ended.stderr
    assert_loads(tmp_path, {5})


# What is said of them.


class Said:
    def __init__(self) -> None:
        self.events: list[tuple[str | None, dict[str, Any]]] = []
        self.lines: list[str] = []

    def __call__(self, text: str, event: str | None = None, **fields: Any) -> None:
        self.lines.append(text)
        self.events.append((event, fields))


def begin_saves(saves: Saves, step: int, state: State | None = None, *, wait: bool = False) -> None:
    pieces = pieces_of(state_at(step) if state is None else state)
    saves.begin(Position(step, 8 * step), pieces, manifest_state(ALONE, step), wait=wait)


def test_each_save_is_said_once_when_its_end_is_known(disk: Disk) -> None:
    said = Said()
    saves = Saves(saver_on(disk, prune=lambda name: ["step-00000000"] if name.endswith("2") else []), disk, said)
    disk.gate.close()
    begin_saves(saves, 1)
    saves.poll()
    assert said.events == [] and saves.saved_at == -1
    disk.gate.open()
    begin_saves(saves, 2)
    assert saves.saved_at == 1
    saves.finish()
    saves.poll()
    assert [event for event, _ in said.events] == ["save", "save", "prune"] and saves.saved_at == 2
    assert [fields.get("step") for _, fields in said.events] == [1, 2, None]
    assert said.events[2][1] == {"pruned": ["step-00000000"]}
    assert f"{disk.folder}/step-00000002" in said.lines[1]
    begin_saves(saves, 3, wait=True)
    assert saves.saved_at == 3 and [event for event, _ in said.events][3:] == ["save"]


def test_failures_are_said_and_the_step_that_is_saved_stays(disk: Disk) -> None:
    said = Said()
    saves = Saves(saver_on(disk), disk, said)
    begin_saves(saves, 1, wait=True)
    disk.problem = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    begin_saves(saves, 2)
    saves.finish()
    event, fields = said.events[-1]
    assert event == "save_failed" and fields["step"] == 2 and os.strerror(errno.EDQUOT) in fields["reason"]
    assert saves.saved_at == 1 and saves.diverged is None
    disk.problem, state = None, state_at(3)
    state[NORM][0] = torch.inf
    begin_saves(saves, 3, state)
    saves.finish()
    assert saves.diverged is not None and saves.diverged[0].step == 3 and saves.saved_at == 1
