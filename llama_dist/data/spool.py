"""The processes that fill the spools of a run, beside its training."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

from llama_dist.config_data import DataConfig
from llama_dist.data.spool_writer import SpoolJob, write_spool
from llama_dist.data.stream import ERROR, reading_of, spelled, spool_of
from llama_dist.errors import RunError, UserError
from llama_dist.files import write_file

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def jobs_of(data: DataConfig, *, fingerprint: str, folder: Path, logs: Path) -> list[SpoolJob]:
    """The spools that a run needs, one for each text."""
    jobs = {}
    for source in data.train:
        if source.stream is not None:
            spool = spool_of(source.stream, fingerprint, folder)
            jobs[spool] = SpoolJob(
                spool,
                spelled(source.stream),
                reading_of(source.stream),
                data.tokenizer,
                fingerprint,
                source.stream.max_skipped,
                logs / f"stream-{spool.name}.log",
            )
    return list(jobs.values())


@contextmanager
def spooling(jobs: Sequence[SpoolJob]) -> Iterator[None]:
    """Have each spool filled by a process of its own, which ends with the block, and with this process.

    What ended one before its text did is told in the spool, where whoever waits for more text finds it.
    """
    context = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = []
    closing = threading.Event()
    try:
        for job in jobs:
            try:
                job.folder.mkdir(parents=True, exist_ok=True)
                (job.folder / ERROR).unlink(missing_ok=True)  # of an earlier start
            except OSError as error:
                raise UserError(f"{job.folder}: cannot be written to: {error.strerror}; mend it, and go on") from error
            process = context.Process(target=_serve, args=(job,), daemon=True, name=f"stream {job.folder.name}")
            with _signals_held_back():
                process.start()
            processes.append(process)
            threading.Thread(target=_watch, args=(process, job, closing), daemon=True).start()
        yield
    finally:
        closing.set()
        for process in processes:  # a pair is added or it is not: there is nothing to be spoilt
            process.kill()
        for process in processes:
            process.join()


def _serve(job: SpoolJob) -> None:
    """What the process of a spool does."""
    for number in SIGNALS:  # they reach the whole group of processes; the parent alone answers
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "a", encoding="utf-8") as file:
        # Libraries print; a run's own output is for what the run says.
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        write_spool(job)
    except (UserError, RunError) as error:
        log.error("%s", error)
        _tell(job, type(error), str(error))
    except OSError as error:
        log.exception("failed")
        _tell(job, RunError, f"{error.filename or job.folder}: {error.strerror or error}")
    except Exception as error:
        log.exception("failed")
        _tell(job, RunError, f"{job.folder}: the process of this stream failed: {error!r}; {job.log} says where")


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """A process that is started here has no signal end it before it can say that it heeds none."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _watch(process: BaseProcess, job: SpoolJob, closing: threading.Event) -> None:
    """Tell of a process that could not tell itself what ended it."""
    process.join()
    if process.exitcode and not closing.is_set():
        code = process.exitcode
        how = f"killed by signal {-code}, most likely because memory ran out" if code < 0 else f"exit status {code}"
        _tell(job, RunError, f"{job.folder}: the process of this stream died ({how}); see {job.log}")


def _tell(job: SpoolJob, kind: type[Exception], text: str) -> None:
    write_file(job.folder / ERROR, json.dumps({"kind": kind.__name__, "text": text}).encode())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a spool is filled by a child process"
    parent.join()
    os._exit(1)
