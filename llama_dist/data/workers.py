"""Processes that make units of work: each reads its own stretch of the inputs and writes its own shards."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType

from llama_dist.data.claims import LOCKS, Claims
from llama_dist.data.tokenizer import Tokenizer, load_tokenizer
from llama_dist.data.units import Job, Unit, discard_work, do_unit
from llama_dist.errors import UserError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
TICK_SECONDS = 1.0
# A worker is one thread: the libraries would start one for each core in each of them.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class Progress:
    """Told of what is done while it is done: this one says nothing."""

    def text(self, size: int) -> None:
        """`size` more bytes of text were tokenized."""

    def unit(self, unit: Unit) -> None:
        """A unit was finished."""

    def tick(self) -> None:
        """A second or so has passed, or something was done."""


def run_here(units: Sequence[Unit], job: Job, tokenizer: Tokenizer, claims: Claims, progress: Progress) -> None:
    """Make the units in this process; those that others work on are left to them."""

    def tell(size: int) -> None:
        progress.text(size)
        progress.tick()

    for unit in units:
        if do_unit(unit, job, tokenizer, claims, tell):
            progress.unit(unit)
            progress.tick()


def run_in_processes(units: Sequence[Unit], job: Job, count: int, progress: Progress) -> None:
    """Make the units in `count` processes of one thread; those that others work on are left to them.

    The processes end with this call, and with this process. Raises UserError where one fails or dies.
    """
    context = multiprocessing.get_context("spawn")
    left = deque(units)
    busy: dict[Connection, tuple[BaseProcess, Unit]] = {}
    processes: list[BaseProcess] = []
    try:
        with _quiet_environment():
            for _ in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(target=serve, args=(theirs, job), daemon=True)
                process.start()
                processes.append(process)
                theirs.close()
                busy[ours] = (process, left.popleft())
        for connection, (_, unit) in busy.items():
            _send(connection, unit)
        while busy:
            for ready in wait(list(busy), timeout=TICK_SECONDS):
                assert isinstance(ready, Connection)
                if not _hear(ready, *busy[ready], progress):
                    continue
                if left:
                    busy[ready] = (busy[ready][0], left.popleft())
                    _send(ready, busy[ready][1])
                else:
                    del busy[ready]
                    ready.close()
            progress.tick()
    finally:
        for process in processes:  # a unit is finished or it is not: there is nothing to be spoilt
            process.kill()
        for process in processes:
            process.join()
            discard_work(job.folder, process.pid or 0)


def _hear(connection: Connection, process: BaseProcess, unit: Unit, progress: Progress) -> bool:
    """Take one message of a worker; returns whether it has nothing to do."""
    try:
        message = connection.recv()
    except (EOFError, ConnectionResetError) as error:
        process.join(TICK_SECONDS)
        code = process.exitcode or 0
        how = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
        raise UserError(
            f"prepare: a worker process died ({how}), most likely because memory ran out; use fewer --workers"
        ) from error
    if isinstance(message, Exception):
        raise message
    if not isinstance(message, bool):
        progress.text(message)
        return False
    if message:
        progress.unit(unit)
    return True


def _send(connection: Connection, unit: Unit) -> None:
    try:
        connection.send(unit)
    except OSError:  # its end is closed, as will be heard when it is listened to
        pass


def serve(connection: Connection, job: Job) -> None:
    """A worker: gets units, sends the bytes of text as they are done (int), then whether it made the unit (bool)."""
    for number in SIGNALS:  # they reach the whole group of processes; the parent alone answers
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        tokenizer = load_tokenizer(job.tokenizer)
        if tokenizer.fingerprint != job.fingerprint:
            raise UserError(f"{job.tokenizer}: changed while it was used; put the right one there and go on")
        with Claims(job.folder / LOCKS) as claims:
            while True:
                unit = connection.recv()
                connection.send(do_unit(unit, job, tokenizer, claims, connection.send))
    except (EOFError, BrokenPipeError):  # the parent has no more to do, or is gone
        return
    except (UserError, OSError) as error:
        connection.send(error)
    except Exception:
        connection.send(RuntimeError(f"prepare: a worker process failed:\n{traceback.format_exc()}"))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _quiet_environment() -> Iterator[None]:
    """What processes that are started here have from the first: one thread each, and Ctrl-C held back."""
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(ONE_THREAD)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM ends the block like Ctrl-C, with KeyboardInterrupt, whose text is the name of the signal."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, _stop) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    for each in SIGNALS:  # what follows takes a moment, and must not be cut short
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt(signal.Signals(number).name)
