"""Pools of gloo workers that distributed tests share: importing torch for each test is what makes such suites slow.

`pool(2).run(function, *args)` calls a module-level `function(*args)` on two ranks that are joined in a process group,
and returns what each rank returned, by rank. A function that raises, a rank that dies and a call that takes too long
all fail the test; the pool is then ended, and the next call starts a fresh one.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from datetime import timedelta
from functools import lru_cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llama_dist.layout import Layout
from llama_dist.runtime import Environment, Runtime, start_runtime

CALL_SECONDS = 120.0  # a call that takes longer hangs: the tests' own work is done in a few seconds
GRACE_SECONDS = 3.0  # what the other ranks get to report, after one has failed
DUMP_SIGNAL = signal.SIGUSR2
THREADS = 120  # of a worker, after which its pool starts anew
LAYOUTS_KEPT = 3  # whose process groups a worker keeps; each group of gloo costs it threads and sockets


class WorkerFailure(AssertionError):
    """A call on a pool went wrong; the text holds the ranks' tracebacks or stacks."""


class Pool:
    """`world` processes in one gloo group, which run one call after the other."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._folder = Path(tempfile.mkdtemp(prefix="llama-dist-workers-"))
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._pipes: list[Connection] = []

    @property
    def pids(self) -> list[int | None]:
        """The workers that live now."""
        return [process.pid for process in self._processes]

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = CALL_SECONDS) -> list[Any]:
        """What each rank returned. Raises WorkerFailure, after ending the pool, when a rank fails or hangs."""
        if self._is_worn():
            self.end()
        if not self._processes:
            self._start()
        answers: dict[int, Any] = {}
        try:
            for pipe in self._pipes:
                pipe.send((sys.path, function, args))
            self._collect(answers, deadline=time.monotonic() + timeout)
            missing = [rank for rank in range(self.world) if rank not in answers]
            assert not missing, f"ranks {missing} gave no answer within {timeout:g} s\n{self._stacks(missing)}"
        except BaseException as error:
            self.end()
            # A fixture or another test may hold a reference to this pool: it stays usable.
            if isinstance(error, AssertionError):
                raise WorkerFailure(f"{function.__name__}{args}: {error}") from None
            raise
        return [answers[rank] for rank in range(self.world)]

    def _is_worn(self) -> bool:
        """Whether the workers have gathered so many threads that they slow each other down.

        DeepSpeed's hooks keep every engine of a process alive, and with it the groups of its layout, of which each has
        threads of its own.
        """
        tasks = [Path(f"/proc/{pid}/task") for pid in self.pids]
        return any(len(list(task.iterdir())) > THREADS for task in tasks if task.is_dir())

    def _collect(self, answers: dict[int, Any], *, deadline: float) -> None:
        failures: dict[int, str] = {}
        while len(answers) + len(failures) < self.world and time.monotonic() < deadline:
            waiting = {self._pipes[r]: r for r in range(self.world) if r not in answers and r not in failures}
            for pipe in wait(list(waiting), timeout=max(deadline - time.monotonic(), 0.0)):
                rank = waiting[pipe]
                try:
                    fine, value = pipe.recv()
                except EOFError:
                    self._processes[rank].join(GRACE_SECONDS)
                    fine, value = False, f"the process ended with status {self._processes[rank].exitcode}\n"
                (answers if fine else failures)[rank] = value
                if not fine:  # whoever waits for this rank in a collective never answers
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        assert not failures, "".join(f"\n--- rank {rank} of {self.world} failed ---\n{failures[rank]}" for rank in sorted(failures))

    def _stacks(self, ranks: list[int]) -> str:
        """Every thread's stack on the given ranks, as their faulthandlers write it."""
        for rank in ranks:
            if self._processes[rank].is_alive():
                os.kill(self._processes[rank].pid, DUMP_SIGNAL)
        time.sleep(0.5)
        return "".join(f"\n--- rank {r} of {self.world}, all threads ---\n{self._stack_file(r).read_text()}" for r in ranks)

    def _stack_file(self, rank: int) -> Path:
        return self._folder / f"stacks-{rank}.txt"

    def _start(self) -> None:
        # One clean process imports what all workers need, once; each worker is a fork of it, as good as a fresh one.
        context = multiprocessing.get_context("forkserver")
        # The second is what DeepSpeed imports in the middle of making an engine, at a cost of seconds.
        context.set_forkserver_preload(["llama_dist.train.session", "deepspeed.runtime.zero.muon.muon_optimizer"])
        os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is loaded
        store = self._folder / "store"
        store.unlink(missing_ok=True)
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(theirs, rank, self.world, str(store), str(self._stack_file(rank))),
                name=f"gloo worker {rank} of {self.world}",
                daemon=True,
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def end(self) -> None:
        """Kill the workers of this pool; the next call starts new ones."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []


@lru_cache
def pool(world: int) -> Pool:
    """The pool of `world` ranks that all tests of this session share."""
    made = Pool(world)
    atexit.register(_forget, made)
    return made


def _forget(made: Pool) -> None:
    made.end()
    shutil.rmtree(made._folder, ignore_errors=True)


def _serve(pipe: Connection, rank: int, world: int, store: str, stacks: str) -> None:
    """A worker's life: join the group, then answer calls until the pipe is closed."""
    dump = open(stacks, "w", encoding="utf-8")
    faulthandler.register(DUMP_SIGNAL, file=dump, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the test run, which then ends the pool
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # DeepSpeed's calls of torch; they would bury a failure's report
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    gc.freeze()  # what was imported stays: a collection need not look through it
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    while True:
        try:
            sys.path[:], function, args = pipe.recv()
            answer = (True, function(*args))
        except EOFError:
            return
        except BaseException:  # the test that made the call must hear of anything
            answer = (False, traceback.format_exc())
        pipe.send(answer)


# By layout and by how many tensor-parallel ranks share a key/value head, the last used at the end.
_runtimes: OrderedDict[tuple[Layout, int], Runtime] = OrderedDict()


def runtime(layout: Layout | None = None, *, kv_heads: int = 1) -> Runtime:
    """This worker's place in a layout of its pool's ranks: by default, a purely data-parallel one.

    Collective over the pool. The groups of the layouts used last are kept, those of others are ended.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    layout = Layout(dp=world) if layout is None else layout
    key = (layout, max(layout.tp // kv_heads, 1))
    if key not in _runtimes:
        while len(_runtimes) >= LAYOUTS_KEPT:
            _, old = _runtimes.popitem(last=False)
            gc.collect()  # engines of earlier calls may still hold its groups
            for group in set(groups_within(old.groups)):
                dist.destroy_process_group(group)
        environment = Environment("env", rank, world, rank, "127.0.0.1", 0)
        _runtimes[key] = start_runtime(
            environment, layout, device=torch.device("cpu"), timeout_seconds=60, kv_heads=kv_heads
        )
    _runtimes.move_to_end(key)
    return _runtimes[key]


def groups_within(value: Any) -> Iterator[dist.ProcessGroup]:
    """All process groups in a tree of dataclasses."""
    if isinstance(value, dist.ProcessGroup):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from groups_within(getattr(value, field.name))
