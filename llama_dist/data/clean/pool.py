"""Worker processes for a list of tasks, with the results in the order of the tasks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from llama_dist.errors import UserError

Result = TypeVar("Result")


class Pool:
    """`count` processes that are started at the first task; with one, everything happens in this process."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._others = multiprocessing.active_children()
        # Not forked: a copy of a process that has threads may hang.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(count, mp_context=context, initializer=_start) if count > 1 else None

    def each(self, function: Callable[..., Result], tasks: Sequence[tuple[Any, ...]]) -> Iterator[Result]:
        """`function(*task)` for each task. Few are ahead of the one that is waited for, so few results lie about."""
        if self._pool is None:
            yield from (function(*task) for task in tasks)
            return
        waiting: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                waiting.append(self._pool.submit(function, *task))
                if len(waiting) >= 4 * self._count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process died, most likely because memory ran out; use fewer --workers, or smaller files"
            ) from error

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._pool is None:
            return
        if kind is not None:  # what they are at is of no use, and may take minutes
            for process in multiprocessing.active_children():
                if process not in self._others:
                    process.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)


def _start() -> None:
    """Signals reach the whole group of processes; the parent alone answers, and a worker ends when it has ended."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    parent.join()
    os._exit(1)
