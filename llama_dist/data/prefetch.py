"""Steps read ahead in a background thread."""

from __future__ import annotations

import queue
import threading
from types import TracebackType

from llama_dist.data.loader import Batch, Loader

PATIENCE = 10.0  # seconds; a thread that still reads then ends with the process
HINTED = 8  # steps, beyond those read ahead, that the operating system is told of


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
    """One thread that reads one step after another; `next` is where the step begins that is taken next."""

    def __init__(self, loader: Loader, first: int, *, steps: int, until: int) -> None:
        self.next = first
        self._loader = loader
        self._until = until
        self._room = threading.Semaphore(steps)
        self._done: queue.SimpleQueue[list[Batch] | BaseException] = queue.SimpleQueue()
        self._closed = threading.Event()
        # A daemon: a process that ends by an exception does not wait for a file system that hangs.
        self._thread = threading.Thread(target=self._read, args=(first,), name="prefetch", daemon=True)
        self._thread.start()

    def take(self) -> list[Batch]:
        found = self._done.get()
        self._room.release()
        if isinstance(found, BaseException):
            raise found
        self.next += self._loader.global_batch
        if self.next >= self._until:
            self.next = -1  # the thread has ended
        return found

    def close(self, seconds: float | None) -> None:
        self._closed.set()
        self._room.release()
        self._thread.join(seconds)

    def _read(self, samples: int) -> None:
        batch = self._loader.global_batch
        hinted = samples
        try:
            while samples < self._until:
                self._room.acquire()
                if self._closed.is_set():
                    return
                self._done.put(self._loader.microbatches(samples))
                samples += batch
                hinted = max(hinted, samples)
                while hinted < min(samples + HINTED * batch, self._until):
                    self._loader.prefetch(hinted)
                    hinted += batch
        except BaseException as error:
            self._done.put(error)
