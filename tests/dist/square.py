"""The square: what any layout saves, every layout loads and goes on from. `test_checkpoint.py` runs a part of it.

    python tests/dist/square.py                 all ordered pairs of the 14 layouts
    python tests/dist/square.py --only dp4      the pairs that have this in one of their names

A run is saved in the background after three steps, and goes on for three more while it is written. Every layout loads
that: the logical tensors (weights and both moments) must be the same bits, every rank must have read the bytes that it
holds and no others, and three further steps must give the losses and gradient norms of the run that went on to 1e-5;
to the bit, with the same state at the end, where the layout is the same.
"""

from __future__ import annotations

import argparse
import os
import platform
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(path) for path in (HERE, HERE.parent, HERE.parents[1]) if str(path) not in sys.path]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import deepspeed  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from small_runs import (  # noqa: E402
    Case,
    Held,
    State,
    assemble,
    coordinator_on_rank,
    position_at,
    restore_on_rank,
    state_on_rank,
    steps_on_rank,
)
from workers import Pool, WorkerFailure  # noqa: E402

BEFORE, AFTER = 3, 3  # steps before and after the save
LIMIT = 1e-5  # relative, of losses and gradient norms
LAYOUTS = [
    Case(dp=2, zero=1),
    Case(dp=2, tp=2, zero=3),
    Case(pp=4, zero=2, schedule="zb-h1"),
    Case(zero=1),
    Case(tp=4, zero=1, sequence_parallel=True),
    Case(cp=2, zero=3),
    Case(dp=2, pp=2, zero=3, schedule="interleaved", virtual_stages=2),
    Case(tp=2, cp=2, zero=2),
    Case(dp=4, zero=3),
    Case(pp=2, tp=2, zero=3, stage_layers=(3, 1)),
    Case(pp=2, cp=2, zero=1),
    Case(zero=3),
    Case(dp=2, tp=2, pp=2, zero=3, sequence_parallel=True),
    Case(dp=4, zero=2),
]


@dataclass(frozen=True)
class Reached:
    """What a rank has after the save or load, and some steps later; `read`: bytes that it read to get there."""

    at_save: list[Held]
    curve: list[tuple[float, float]]
    at_end: list[Held]
    read: int = 0


def save_on_rank(case: Case) -> Reached:
    coordinator = coordinator_on_rank(case)
    steps_on_rank(coordinator, case, restore_on_rank(coordinator), BEFORE)
    at_save = state_on_rank(coordinator)
    coordinator.save(position_at(BEFORE), last=False)  # the steps that follow must not change what is written
    curve = steps_on_rank(coordinator, case, position_at(BEFORE), AFTER)
    coordinator.saves.finish()
    return Reached(at_save, curve, state_on_rank(coordinator))


def load_on_rank(case: Case) -> Reached:
    coordinator = coordinator_on_rank(case)
    read: list[int] = []

    def tell(*args: str, **fields: Any) -> None:  # on every rank, and not on the coordinator only
        read.extend(value for name, value in fields.items() if name == "bytes_read")

    coordinator.tell = tell
    position = restore_on_rank(coordinator)
    assert position == position_at(BEFORE), "the run goes on where it was saved"
    at_save = state_on_rank(coordinator)
    curve = steps_on_rank(coordinator, case, position, AFTER)
    return Reached(at_save, curve, state_on_rank(coordinator), sum(read))


@dataclass(frozen=True)
class Outcome:
    """What all ranks of a run have together. `read` and `held`: bytes by rank, read at the load and held after it."""

    case: Case
    at_save: State
    curve: list[tuple[float, float]]
    at_end: State
    read: list[int]
    held: list[int]


def gathered(case: Case, ranks: list[Reached]) -> Outcome:
    at_save, at_end = ([getattr(reached, at) for reached in ranks] for at in ("at_save", "at_end"))
    held = [sum(one.data.nbytes for one in rank) for rank in at_save]
    read = [reached.read for reached in ranks]
    return Outcome(case, assemble(case, at_save), ranks[0].curve, assemble(case, at_end), read, held)


def saving(case: Case, folder: Path) -> Case:
    """The case as one that saves under `folder`."""
    return replace(case, micro_batch=2, folder=str(folder / str(case)))


def loading(source: Outcome, case: Case) -> Case:
    """The case as one that loads what `source` saved."""
    return replace(case, micro_batch=2, folder=source.case.folder)


def different(a: State, b: State) -> list[str]:
    """The logical tensors that are not the same bits in both."""
    names = [(name, key) for name in a.keys() | b.keys() for key in a.get(name, b.get(name, {}))]
    return [
        f"{key} of {name}"
        for name, key in sorted(names)
        if name not in a or name not in b or a[name][key].tobytes() != b[name][key].tobytes()
    ]


def deviation(found: Outcome, source: Outcome) -> float:
    """The largest relative deviation of a loss or a gradient norm."""
    ours, theirs = np.array(found.curve), np.array(source.curve)
    assert ours.shape == theirs.shape == (len(source.curve), 2)
    return float(np.max(np.abs(ours - theirs) / np.abs(theirs)))


def problems_of(source: Outcome, found: Outcome, *, same_layout: bool, limit: float = LIMIT) -> list[str]:
    """What is wrong with what one layout made of what another saved."""
    problems = [f"not the bits that were saved: {name}" for name in different(found.at_save, source.at_save)]
    if not all((arrays["exp_avg"] != 0).any() for arrays in source.at_save.values()):
        problems.append("there were no moments to carry over")
    if found.read != found.held:
        problems.append(f"the ranks read {found.read} bytes and hold {found.held}")
    worst = deviation(found, source)
    if not worst <= limit:
        problems.append(f"the curve deviates by {worst:.2e}")
    if same_layout:
        if found.curve != source.curve:
            problems.append(f"the same layout's curve is not the same to the bit: {found.curve}, {source.curve}")
        problems += [f"not the bits of the run that went on: {name}" for name in different(found.at_end, source.at_end)]
    return problems


@dataclass
class Report:
    """What came of the pairs so far; prints a line for each."""

    total: int
    done: int = 0
    failed: list[str] = field(default_factory=list)
    worst: tuple[float, str] = (0.0, "none")
    same: int = 0
    read: int = 0
    started_at: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, pair: str, found: Outcome | None, problems: list[str], worst: float, seconds: float) -> None:
        with self.lock:
            self.done += 1
            if problems:
                self.failed.append(pair)
                print(f"{self.done:>3} FAILED {pair}: {'; '.join(problems[:3])}", flush=True)
                return
            self.read += sum(found.read)
            self.same += worst == 0
            self.worst = max(self.worst, (worst, pair))
            at_most = max(found.read) / 1000
            line = f"{sum(found.read) / 1000:.0f} kB read, at most {at_most:.0f} a rank; deviation {worst:.1e}"
            print(f"{self.done:>3} {pair}: same bits; {line}; {seconds:.1f} s", flush=True)

    def close(self) -> int:
        """Print the sums; the exit status."""
        minutes = (time.monotonic() - self.started_at) / 60
        passed = self.done - len(self.failed)
        print(f"\n{self.done} pairs of {self.total}, {passed} passed, {len(self.failed)} failed, in {minutes:.1f} minutes")
        print(f"weights and moments the same bits in {passed}; curves the same bits in {self.same}; {self.read / 1e6:.1f} MB read")
        print(f"largest deviation of a loss or gradient norm: {self.worst[0]:.2e} (limit {LIMIT:.0e}), {self.worst[1]}")
        git = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(git, cwd=HERE, capture_output=True, text=True, check=False).stdout.strip()
        print(
            f"{time.strftime('%Y-%m-%d %H:%M %Z')}; commit {commit or 'unknown'}; Python {platform.python_version()}, "
            f"torch {torch.__version__}, DeepSpeed {deepspeed.__version__}; {os.cpu_count()} cores"
        )
        return 0 if passed == self.total and self.done else 1


def run_square(layouts: Sequence[Case], folder: Path, *, only: str, processes: int) -> int:
    """Save under each layout, load under each; the exit status."""
    pairs = [(a, b) for b in layouts for a in layouts if only in str(a) or only in str(b)]
    report = Report(len(pairs))
    sources: dict[Case, Outcome] = {}
    by_world = sorted({case.world for case in layouts})
    for world in by_world:
        origins = {a for a, _ in pairs if a.world == world}
        _side_by_side(world, processes, [a for a in layouts if a in origins], lambda pool, a: _save(pool, a, folder, sources))
    print(f"{len(sources)} layouts have saved, in {time.monotonic() - report.started_at:.0f} s", flush=True)
    for world in by_world:
        chosen = [pair for pair in pairs if pair[1].world == world]
        _side_by_side(world, processes, chosen, lambda pool, pair: _load(pool, *pair, sources, report))
    return report.close()


def _save(pool: Pool, case: Case, folder: Path, sources: dict[Case, Outcome]) -> None:
    case_here = saving(case, folder)
    try:
        sources[case] = gathered(case_here, pool.run(save_on_rank, case_here))
    except (WorkerFailure, AssertionError) as failure:
        print(f"{case} did not save: {failure}", file=sys.stderr)


def _load(pool: Pool, origin: Case, target: Case, sources: dict[Case, Outcome], report: Report) -> None:
    pair, started_at, found, worst = f"{origin} -> {target}", time.monotonic(), None, 0.0
    if origin not in sources:
        report.add(pair, None, ["it was not saved"], 0.0, 0.0)
        return
    source = sources[origin]
    case = loading(source, target)
    try:
        found = gathered(case, pool.run(load_on_rank, case))
        problems, worst = problems_of(source, found, same_layout=origin == target), deviation(found, source)
    except (WorkerFailure, AssertionError) as failure:
        print(f"\n{failure}", file=sys.stderr)
        problems = [str(failure).strip().splitlines()[-1]]
    report.add(pair, found, problems, worst, time.monotonic() - started_at)


def _side_by_side(world: int, processes: int, items: Sequence[Any], work: Any) -> None:
    """Call `work(pool, item)` for all items, in as many pools of `world` workers as make `processes`."""
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for item in items:
        waiting.put(item)

    def lane() -> None:
        pool = Pool(world)
        try:
            while True:
                work(pool, waiting.get_nowait())
        except queue.Empty:
            pass
        finally:
            pool.end()

    lanes = [threading.Thread(target=lane, daemon=True) for _ in range(max(1, min(processes // world, len(items))))]
    for thread in lanes:
        thread.start()
    for thread in lanes:
        thread.join()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", metavar="TEXT", default="", help="pairs that have this in one of their names")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="workers at a time, at least one layout's")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="llama-dist-square-") as folder:
        return run_square(LAYOUTS, Path(folder), only=chosen.only, processes=chosen.processes)


if __name__ == "__main__":
    import square  # workers look for its functions by this name

    sys.exit(square.main())
