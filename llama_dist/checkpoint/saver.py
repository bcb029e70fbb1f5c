"""Saves that training does not wait for: the state is copied to host memory, and written from there in a thread."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from llama_dist.checkpoint.dcp import NotFiniteError
from llama_dist.checkpoint.local_level import LocalLevel
from llama_dist.checkpoint.pieces import Piece
from llama_dist.checkpoint.places import Place
from llama_dist.checkpoint.plan import ITEM
from llama_dist.checkpoint.saving import SaveError, save_checkpoint
from llama_dist.checkpoint.store import Position
from llama_dist.files import aligned_memory
from llama_dist.runtime import wait_for_device


@dataclass(frozen=True)
class Saved:
    """How a save ended; `error` is SaveError or NotFiniteError, the same on all ranks.

    `blocked`: seconds that training waited on this rank; `seconds`: until the checkpoint was durable.
    """

    position: Position
    name: str
    blocked: float
    seconds: float
    local: bool = False
    error: Exception | None = None
    pruned: tuple[str, ...] = ()
    prune_problem: str | None = None


class Saver:
    """Saves one checkpoint at a time; the next waits for the last. Every rank makes the same calls in the same order.

    In the background, the copy to host memory too: until `before_update` returns, nothing may change the pieces.
    `group` is of all ranks and used by nobody else. `prune`, on the coordinator, is called with the name of each
    checkpoint that was committed and returns those that it has deleted.
    """

    def __init__(
        self,
        place: Place,
        *,
        attempt: int,
        group: dist.ProcessGroup | None,
        may_commit: Callable[[], str | None] = lambda: None,
        prune: Callable[[str], list[str]] | None = None,
        local: LocalLevel | None = None,
    ) -> None:
        self._place = place
        self._attempt = attempt
        self._group = group
        self._may_commit = may_commit
        self._prune = prune
        self._local = local
        self._staging: torch.Tensor | None = None
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        self._blocked = 0.0
        self._saved: Saved | None = None
        self._broken: BaseException | None = None

    def save(
        self, position: Position, pieces: Sequence[Piece], state: dict[str, Any], *, wait: bool, local: bool = False
    ) -> Saved | None:
        """Begin to save; with `wait`, return when it is done. Returns how the save before ended, if not told yet.

        `local`: to the nodes' own disks.
        """
        started_at = time.perf_counter()
        before = self.finish()
        if wait:
            self._copied.set()
            self._write(position, pieces, state, started_at, local)
        else:
            self._copied.clear()
            arguments = position, pieces, state, started_at, local
            self._thread = threading.Thread(target=self._copy_and_write, args=arguments, name="saver", daemon=True)
            atexit.register(self._thread.join)  # a process that ends does not give up what it has begun to write
            self._thread.start()
        self._blocked = time.perf_counter() - started_at
        return before

    def before_update(self) -> None:
        """Wait until the state has been copied: the optimizer may change it from here on."""
        started_at = time.perf_counter()
        if self._thread is not None:
            self._copied.wait()
            self._blocked += time.perf_counter() - started_at

    def poll(self) -> Saved | None:
        """How the save ended, once."""
        if self._thread is not None and self._thread.is_alive():
            return None
        return self.finish()

    def finish(self) -> Saved | None:
        """Wait for the save under way; returns how it ended unless that was told. Raises what else went wrong in it."""
        if self._thread is not None:
            self._thread.join()
            atexit.unregister(self._thread.join)
            self._thread = None
        broken, self._broken = self._broken, None
        if broken is not None:
            raise broken
        saved, self._saved = self._saved, None
        return None if saved is None else replace(saved, blocked=self._blocked)

    def _copy_and_write(
        self, position: Position, pieces: Sequence[Piece], state: dict[str, Any], started_at: float, local: bool
    ) -> None:
        try:
            staged = self._stage(pieces)
            self._copied.set()
            self._write(position, staged, state, started_at, local)
        except BaseException as error:
            self._broken = error
        finally:
            self._copied.set()

    def _stage(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The pieces in host memory, which is kept for the next save."""
        total = sum(piece.data.numel() for piece in pieces)
        on_gpu = any(piece.data.is_cuda for piece in pieces)
        if self._staging is None or self._staging.numel() != total:
            self._staging = _host_memory(total, pinned=on_gpu)
        staged, at = [], 0
        for piece in pieces:
            data = self._staging[at : at + piece.data.numel()].view(piece.data.shape)
            data.copy_(piece.data, non_blocking=on_gpu)
            staged.append(replace(piece, data=data))
            at += piece.data.numel()
        if on_gpu:
            wait_for_device()
        return staged

    def _write(
        self, position: Position, pieces: Sequence[Piece], state: dict[str, Any], started_at: float, local: bool
    ) -> None:
        name, failed, pruned, problem = "", None, [], None
        options = {"state": state, "attempt": self._attempt, "may_commit": self._may_commit}
        try:
            if local:
                name = self._local.save(position, pieces, **options)
            else:
                name = save_checkpoint(self._place, position, pieces, group=self._group, **options)
        except (SaveError, NotFiniteError) as error:
            failed = error
        seconds = time.perf_counter() - started_at
        try:
            if failed is None and local:
                self._local.prune()
            elif failed is None and self._prune is not None:
                pruned = self._prune(name)
        except OSError as error:
            problem = str(error)
        self._saved = Saved(position, name, 0.0, seconds, local, failed, tuple(pruned), problem)


def _host_memory(total: int, *, pinned: bool) -> torch.Tensor:
    """A float32 tensor of `total` elements: pinned for copies from a GPU, else aligned for writes past the page cache."""
    if pinned:
        return torch.empty(total, dtype=torch.float32, pin_memory=True)
    return torch.frombuffer(aligned_memory(max(total, 1) * ITEM), dtype=torch.float32)[:total]
