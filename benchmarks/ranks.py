"""Processes that stand in for the ranks of a run, and the memory that each of them holds.

For benchmarks on one machine: gloo between processes on the CPU, NCCL where every rank has a GPU of its own.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import socket
import threading
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from llama_dist.runtime import Environment, stop_runtime

# What takes seconds to import and many megabytes to hold, in part at first use only: imported once for all ranks.
PRELOAD = (
    "llama_dist.pipeline.runner", "torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.module_inject.auto_ep_layer",
)  # fmt: skip
SAMPLE_SECONDS = 0.002
RETURN_AT_ONCE = 64 << 10  # bytes from which freed memory goes back to the system
KEEP = 32 << 20  # as glibc arranges itself after a few large allocations
MMAP_THRESHOLD = -3  # of mallopt


class Ranks:
    """`world` processes of which each makes `factory(environment, *args)` and then answers calls of its methods."""

    def __init__(self, world: int, factory: Callable[..., Any], *args: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOAD))
        os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is loaded
        port = _free_port()
        self._pipes: list[Connection] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            environment = Environment("env", rank, world, rank, "127.0.0.1", port)
            process = context.Process(target=_serve, args=(theirs, environment, factory, args), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._answers()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            process.kill()

    def call(self, method: str, *args: Any) -> list[Any]:
        """What the method returned on each rank. Raises RuntimeError with a rank's traceback where one failed."""
        for pipe in self._pipes:
            pipe.send((method, args))
        return self._answers()

    def _answers(self) -> list[Any]:
        answers, waiting = {}, dict(enumerate(self._pipes))
        while waiting:
            ready = wait(list(waiting.values()))
            for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
                try:
                    fine, answers[rank] = waiting.pop(rank).recv()
                except EOFError:
                    fine, answers[rank] = False, "it ended without a word"
                if not fine:  # the others may wait for it in a collective
                    for process in self._processes:
                        process.kill()
                    raise RuntimeError(f"rank {rank} of {len(self._pipes)} failed: {answers[rank]}")
        return [answers[rank] for rank in range(len(self._pipes))]


def _serve(pipe: Connection, environment: Environment, factory: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # DeepSpeed's calls of torch
    if environment.master_addr == "127.0.0.1":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        served = factory(environment, *args)
        pipe.send((True, None))
        while True:
            method, values = pipe.recv()
            pipe.send((True, getattr(served, method)(*values)))
    except EOFError:  # no more calls
        stop_runtime()
    except Exception:
        pipe.send((False, traceback.format_exc()))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class PeakMemory:
    """The most memory of this process while the block runs, above what it held before: `bytes` and `reserved`.

    On a GPU both are what torch has allocated. On the CPU `bytes` are in RAM and `reserved` are asked for, whether they
    were ever written to or not: what a GPU would hold. Only the process's own data, not the code of its libraries;
    looked at every two milliseconds. Freed memory is given back to the system at once, so that it counts no more.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._before = self._peak = (0, 0)
        self._over = False

    @property
    def bytes(self) -> int:
        self._look()
        return self._peak[0] - self._before[0]

    @property
    def reserved(self) -> int:
        self._look()
        return self._peak[1] - self._before[1]

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = (torch.cuda.memory_allocated(),) * 2
        else:
            give_back_memory(at_once=True)
            self._before = self._peak = data_bytes()
            self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._look()
        self._over = True
        if self._device.type == "cpu":
            self._done.set()
            self._watcher.join()
            give_back_memory(at_once=False)

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self._look()

    def _look(self) -> None:
        if self._over:
            return
        on_gpu = self._device.type == "cuda"
        now = (torch.cuda.max_memory_allocated(),) * 2 if on_gpu else data_bytes()
        self._peak = (max(self._peak[0], now[0]), max(self._peak[1], now[1]))


def data_bytes() -> tuple[int, int]:
    """Data of this process that is in RAM, and all that it has asked for."""
    status = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/self/status").read_text(), flags=re.MULTILINE))
    return 1024 * int(status["RssAnon"]), 1024 * int(status["VmData"])


def give_back_memory(*, at_once: bool) -> None:
    """Whether freed memory goes back to the system at once, which makes it countable and new memory slow to get.

    Does nothing without glibc: then what is resident may be more than what is in use.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.malloc_trim(0)
        libc.mallopt(MMAP_THRESHOLD, RETURN_AT_ONCE if at_once else KEEP)


def busy_seconds() -> float:
    """CPU time of all processes of this machine since it started."""
    user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
