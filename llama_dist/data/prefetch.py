"""Steps read ahead in a background thread."""

from __future__ import annotations

import atexit
import queue
import threading
from collections import deque
from types import TracebackType

from llama_dist.data.loader import Batch, Loader

PATIENCE = 10.0  # seconds; a thread that still reads then ends with the process
HINTED = 8  # steps, beyond those read ahead, that the operating system is told of
HANDED_OVER = 1 << 18  # tokens: waking the other thread takes as long as copying tens of thousands of them


class Prefetching:
    """A loader whose next steps are read while the present one is computed; the batches are the same.

    Each step follows the one before, up to the sample `until`; a step out of turn is read from there on. What fails in
    the thread is raised where its step is asked for. Use it with `with`, or close it: its thread ends with it.
    """

    def __init__(self, loader: Loader, *, steps: int, until: int) -> None:
        self._loader = loader
        self._steps = steps
        self._until = until
        self._reader: _Reader | None = None

    def microbatches(self, samples_consumed: int) -> list[Batch]:
        """As `Loader.microbatches`."""
        if self._reader is None or self._reader.next != samples_consumed:
            self._end(None)  # two threads may not read by one loader
            if not self._steps or samples_consumed >= self._until:
                return self._loader.microbatches(samples_consumed)
            self._reader = _Reader(self._loader, samples_consumed, steps=self._steps, until=self._until)
        try:
            return self._reader.take()
        except Exception:  # the thread has ended
            self._end(None)
            raise

    def close(self) -> None:
        """End the thread after the step that it is reading, but wait no longer than a slow disk takes for one."""
        self._end(PATIENCE)

    def _end(self, seconds: float | None) -> None:
        if self._reader is not None:
            self._reader.close(seconds)
            self._reader = None

    def __enter__(self) -> Prefetching:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Reader:
    """One thread that reads one step after another; `next` is where the step begins that is taken next.

    Small steps are handed over several at a time.
    """

    def __init__(self, loader: Loader, first: int, *, steps: int, until: int) -> None:
        self.next = first
        self._loader = loader
        self._until = until
        self._together = max(1, HANDED_OVER // loader.tokens_per_step)
        self._room = threading.Semaphore(steps)
        self._done: queue.SimpleQueue[list[list[Batch] | BaseException]] = queue.SimpleQueue()
        self._taken: deque[list[Batch] | BaseException] = deque()
        self._closed = threading.Event()
        # A daemon, told at exit: a process that ends by an exception does not wait for a file system that hangs, but a
        # thread that the interpreter ends inside of torch takes the process down with a signal.
        atexit.register(self.close, PATIENCE)
        self._thread = threading.Thread(target=self._read, args=(first,), name="prefetch", daemon=True)
        self._thread.start()

    def take(self) -> list[Batch]:
        if not self._taken:
            self._taken.extend(self._done.get())
            self._room.release()
        found = self._taken.popleft()
        if isinstance(found, BaseException):
            raise found
        self.next += self._loader.global_batch
        if self.next >= self._until:
            self.next = -1  # the thread has ended
        return found

    def close(self, seconds: float | None) -> None:
        atexit.unregister(self.close)
        self._closed.set()
        self._room.release()
        self._thread.join(seconds)

    def _read(self, samples: int) -> None:
        batch, together, hinted = self._loader.global_batch, 1, samples  # the first step is waited for
        read: list[list[Batch] | BaseException] = []
        try:
            while samples < self._until:
                self._room.acquire()
                while samples < self._until and len(read) < together:
                    if self._closed.is_set():
                        return
                    read.append(self._loader.microbatches(samples))
                    samples += batch
                self._done.put(read)
                read, together, hinted = [], self._together, max(hinted, samples)
                while hinted < min(samples + HINTED * batch, self._until):
                    self._loader.prefetch(hinted)
                    hinted += batch
        except BaseException as error:
            self._done.put([*read, error])
