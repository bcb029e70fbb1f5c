"""One rank of a small run whose state is saved and loaded, by this project or by others; see checkpoint.py."""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import xxhash
from torch.distributed import checkpoint as dcp

from llama_dist.checkpoint.pieces import pieces_of_shares
from llama_dist.checkpoint.places import LocalPlace
from llama_dist.checkpoint.plan import STATES, SavedLayout
from llama_dist.checkpoint.saver import Saver
from llama_dist.checkpoint.store import Position, load_pieces, newest_valid
from llama_dist.config import RunConfig
from llama_dist.data.loader import Batch
from llama_dist.layout import Layout
from llama_dist.model.stages import stage_layers
from llama_dist.pipeline.engine import StageEngine
from llama_dist.pipeline.runner import build_runner
from llama_dist.runtime import Environment, Runtime, start_runtime

SAVED, LOADED = 7, 3  # what is told apart: the state before, and what is put in its place before it is loaded
WARM_UP = 2  # steps


@dataclass
class Found:
    """What one rank measured. Seconds, but for `memory` and `bytes`."""

    bytes: int = 0
    written: list[float] = field(default_factory=list)  # from the call until all is on disk; nothing else going on
    quiet: list[float] = field(default_factory=list)  # steps without a save
    blocked: list[float] = field(default_factory=list)  # for each save while training goes on
    durable: list[float] = field(default_factory=list)
    stepping: list[float] = field(default_factory=list)  # steps while a save was under way, without what they waited
    memory: int = 0  # more than a step without a save needs, at the first save
    loads: dict[str, list[float]] = field(default_factory=dict)


class Contender(Protocol):
    """A way to save a run's state and to load it. Collective over all ranks."""

    loads: tuple[str, ...]

    def save(self, number: int) -> None:
        """Begin to save; training goes on when this returns."""

    def before_update(self) -> None:
        """Wait until the state may change."""

    def is_done(self) -> bool: ...

    def finish(self) -> float:
        """Wait for the save; when it was durable, as time.perf_counter()."""

    def load(self, number: int, how: str) -> None:
        """Fill the engine's state from a save."""


class Trial:
    """The rank: engine, random state, and steps."""

    def __init__(self, environment: Environment, run: RunConfig, name: str, folder: str) -> None:
        layout = Layout(environment.world_size)
        self._run, self._folder = run, Path(folder)
        self._runtime = start_runtime(
            environment, layout, device=torch.device("cpu"), timeout_seconds=300, kv_heads=run.model.num_key_value_heads
        )
        self._runner = build_runner(run, self._runtime, dtype=torch.float32)
        self._engine = self._runner.engine
        generator = torch.Generator().manual_seed(environment.rank)
        for share in self._engine.shares():
            share.master.normal_(std=0.02, generator=generator)
        self._engine.refresh()
        rows, length = run.parallel.micro_batch, run.data.seq_len
        self._batch = Batch(torch.randint(run.model.vocab_size, (rows, length + 1), generator=generator))
        # Of all ranks and used by nobody else: training goes on while a save agrees.
        group = dist.new_group(backend="gloo")
        self._contender = CONTENDERS[name](self._engine, run, self._runtime, group, self._folder)
        self._found = Found(bytes=sum(3 * share.master.nbytes for share in self._engine.shares()))

    def measure(self, saves: int, loads: int) -> Found:
        """Save while training goes on, then with nothing else going on, then load."""
        self._step()  # the moments are numbers then
        self._train(saves)
        self._write(saves)
        self._load(loads)
        return self._found

    def _write(self, saves: int) -> None:
        for number in range(100, 100 + saves):
            self._prepare()
            began = time.perf_counter()
            self._contender.save(number)
            self._contender.before_update()
            self._found.written.append(self._contender.finish() - began)
            self._keep_only(number)

    def _train(self, saves: int) -> None:
        for _ in range(WARM_UP):
            self._step()
        reset_peak()
        self._found.quiet.append(self._step())
        usual = peak_bytes()
        for number in range(saves):
            self._prepare()
            reset_peak()
            began = time.perf_counter()
            self._contender.save(number)
            blocked, steps = time.perf_counter() - began, 0
            while not steps or not self._all_done():
                step_began = time.perf_counter()
                self._runner.train_step([self._batch])
                waited = time.perf_counter()
                self._contender.before_update()
                waited = time.perf_counter() - waited
                self._engine.apply_gradients(self._run.optim.lr)
                self._found.stepping.append(time.perf_counter() - step_began - waited)
                blocked, steps = blocked + waited, steps + 1
            self._found.durable.append(self._contender.finish() - began)
            if not number:
                self._found.memory = max(peak_bytes() - usual, 0)
            self._found.blocked.append(blocked)
            self._keep_only(number)
            self._found.quiet += [self._step() for _ in range(2)]

    def _all_done(self) -> bool:
        """Whether the save is done everywhere, so that all ranks take as many steps."""
        left = torch.tensor([not self._contender.is_done()], dtype=torch.int32)
        dist.all_reduce(left, group=self._runtime.groups.control)
        return not left

    def _step(self) -> float:
        began = time.perf_counter()
        self._runner.train_step([self._batch])
        self._engine.apply_gradients(self._run.optim.lr)
        return time.perf_counter() - began

    def _load(self, loads: int) -> None:
        self._prepare()
        self._contender.save(999)
        self._contender.before_update()
        self._contender.finish()
        self._keep_only(999)
        expected = self._digest()
        for how in self._contender.loads:
            for _ in range(loads):
                for share in self._engine.shares():
                    for state in (share.master, share.exp_avg, share.exp_avg_sq):
                        state.fill_(LOADED)
                self._prepare()
                began = time.perf_counter()
                self._contender.load(999, how)
                self._found.loads.setdefault(how, []).append(time.perf_counter() - began)
                assert self._digest() == expected, f"{how}: what was loaded is not what was saved"

    def _digest(self) -> str:
        digest = xxhash.xxh3_128()
        for share in self._engine.shares():
            for state in (share.master, share.exp_avg, share.exp_avg_sq):
                digest.update(state.contiguous().numpy())
        return digest.hexdigest()

    def _keep_only(self, number: int) -> None:
        dist.barrier(group=self._runtime.groups.control)
        if self._runtime.rank == 0:
            for path in self._folder.iterdir():
                if path.is_dir() and int(re.search(r"\d+", path.name)[0]) != number:
                    shutil.rmtree(path)

    def _prepare(self) -> None:
        """Nothing is under way, and no file is in memory.

        A virtual machine may have given its free memory back to its host, which makes the next use of it slow: it is
        used here once, for whoever comes next.
        """
        dist.barrier(group=self._runtime.groups.control)
        if self._runtime.rank == 0:
            os.sync()
            for path in self._folder.rglob("*"):
                if path.is_file():
                    handle = os.open(path, os.O_RDONLY)
                    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                    os.close(handle)
            torch.ones(3 * self._found.bytes * self._runtime.layout.world // 4)
        dist.barrier(group=self._runtime.groups.control)


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most memory of this process that was in RAM since `reset_peak`."""
    return 1024 * int(re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), flags=re.MULTILINE)[1])


class Ours:
    """The Saver, as training uses it."""

    loads = ("full", "fast")

    def __init__(
        self, engine: StageEngine, run: RunConfig, runtime: Runtime, group: dist.ProcessGroup, folder: Path
    ) -> None:
        layers = stage_layers(run.model, stages=1, seq_len=run.data.seq_len)
        self._engine, self._group, self._place = engine, group, LocalPlace(folder)
        self._saver = Saver(self._place, attempt=1, group=group)
        saved = SavedLayout(run.model, runtime.layout, run.parallel.zero, tuple(layers))
        self._state = {"config": {"model": run.model.model_dump()}, "layout": saved.to_json()}
        self._began, self._seconds = 0.0, 0.0

    asynchronous = True

    def save(self, number: int) -> None:
        self._began = time.perf_counter()
        pieces = [piece for piece in self._pieces() if piece.owner]
        self._saver.save(Position(number, number), pieces, self._state, wait=not self.asynchronous)

    def before_update(self) -> None:
        self._saver.before_update()

    def is_done(self) -> bool:
        return self._saver._thread is None or not self._saver._thread.is_alive()

    def finish(self) -> float:
        saved = self._saver.finish()
        assert saved.error is None, saved.error
        return self._began + saved.seconds

    def load(self, number: int, how: str) -> None:
        checkpoint, _ = newest_valid(self._place, group=self._group, full=how == "full")
        assert checkpoint.position.step == number
        load_pieces(checkpoint, self._pieces())
        self._engine.refresh()

    def _pieces(self) -> list[Any]:
        return pieces_of_shares(self._engine.shares(), self._engine.stage.slices)


class OursWaiting(Ours):
    asynchronous = False


class Dcp:
    """torch.distributed.checkpoint with its default storage, planner and staging; each share a tensor of its own."""

    loads = ("load",)
    asynchronous = False

    def __init__(
        self, engine: StageEngine, run: RunConfig, runtime: Runtime, group: dist.ProcessGroup, folder: Path
    ) -> None:
        self._engine, self._group, self._folder, self._rank = engine, group, folder, runtime.rank
        self._done_at = 0.0

    def save(self, number: int) -> None:
        dcp.save(self._state(), checkpoint_id=self._folder / str(number), process_group=self._group)
        self._done_at = time.perf_counter()

    def before_update(self) -> None: ...

    def is_done(self) -> bool:
        return True

    def finish(self) -> float:
        return self._done_at

    def load(self, number: int, how: str) -> None:
        dcp.load(self._state(), checkpoint_id=self._folder / str(number), process_group=self._group)
        self._engine.refresh()

    def _state(self) -> dict[str, torch.Tensor]:
        return {
            f"{share.name}.{state or 'master'}@{self._rank}": getattr(share, state or "master")
            for share in self._engine.shares()
            for state in STATES
        }


class DcpAsync(Dcp):
    asynchronous = True
    _saving: Future | None = None

    def save(self, number: int) -> None:
        self._done = threading.Event()
        self._saving = dcp.async_save(
            self._state(), checkpoint_id=self._folder / str(number), process_group=self._group
        )
        self._saving.add_done_callback(self._note)

    def _note(self, _: Future) -> None:
        self._done_at = time.perf_counter()
        self._done.set()

    def is_done(self) -> bool:
        return self._done.is_set()

    def finish(self) -> float:
        self._saving.result()
        self._done.wait()
        return self._done_at


class DeepSpeed:
    """save_checkpoint and load_checkpoint of the engine that trains. It does not wait for the disk."""

    loads = ("load",)
    asynchronous = False

    def __init__(
        self, engine: StageEngine, run: RunConfig, runtime: Runtime, group: dist.ProcessGroup, folder: Path
    ) -> None:
        self._engine, self._folder = engine.engine, folder
        self._done_at = 0.0

    def save(self, number: int) -> None:
        self._engine.save_checkpoint(str(self._folder), tag=str(number), save_latest=False)
        self._done_at = time.perf_counter()

    def before_update(self) -> None: ...

    def is_done(self) -> bool:
        return True

    def finish(self) -> float:
        return self._done_at

    def load(self, number: int, how: str) -> None:
        path, _ = self._engine.load_checkpoint(str(self._folder), tag=str(number))
        assert path is not None


class TorchSave(Dcp):
    """torch.save of what a rank holds into a file of its own, and fsync."""

    def save(self, number: int) -> None:
        folder = self._folder / str(number)
        folder.mkdir(exist_ok=True)
        with open(folder / f"{self._rank}.pt", "wb") as file:
            torch.save(self._state(), file)
            file.flush()
            os.fsync(file.fileno())
        dist.barrier(group=self._group)
        self._done_at = time.perf_counter()

    def load(self, number: int, how: str) -> None:
        loaded = torch.load(self._folder / str(number) / f"{self._rank}.pt", weights_only=True)
        for name, tensor in self._state().items():
            tensor.copy_(loaded[name])
        self._engine.refresh()


CONTENDERS: dict[str, Callable[..., Contender]] = {
    "ours, asynchronous": Ours,
    "ours, waiting": OursWaiting,
    "DCP async_save": DcpAsync,
    "DCP save": Dcp,
    "DeepSpeed": DeepSpeed,
    "torch.save + fsync": TorchSave,
}
