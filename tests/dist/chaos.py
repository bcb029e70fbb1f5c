"""Chaos: ranks of real runs are killed at random instants, and the runs go on, on other layouts, to the same end.

    python tests/dist/chaos.py                          200 trials, two at a time
    python tests/dist/chaos.py --seed 1 --only 17       one of them again, with its log

A trial is a run whose start, on a random layout, loses a random rank to SIGKILL; the other ranks live on for a moment,
as under a launcher, and end. It is started again on a random layout, perhaps to be killed again, and at last goes to its
end. In half of the trials the kill waits for a save or a prune to be seen in the run folder; file operations are
slowed at random there, so that it hits any of them. Then these must hold:

- the step that each start goes on from is the newest that was committed before (no committed step is lost, nothing
  half-written is believed), in the run folder or on the nodes' disks, of which one may be lost in between;
- losses and gradient norms of all steps are those of the undisturbed run of one process to 1e-5; to the bit those of
  the undisturbed run of the same layout, where a trial keeps to one;
- `llama-dist verify` finds nothing wrong, and nothing is left over.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(path) for path in (HERE, HERE.parent, HERE.parents[1]) if str(path) not in sys.path]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import yaml  # noqa: E402

from llama_dist.checkpoint.retention import step_of  # noqa: E402
from llama_dist.checkpoint.whole import checkpoints_at, problems_of  # noqa: E402
from llama_dist.cli import main as llama_dist  # noqa: E402
from llama_dist.data.prepare import prepare  # noqa: E402
from llama_dist.data.vocabulary import train_tokenizer  # noqa: E402
from llama_dist.train.metrics import read_metrics  # noqa: E402

REPO = HERE.parents[1]
# Imported once for all ranks of all trials.
PRELOAD = ["llama_dist.train.session", "torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer"]
STEPS, EVERY = 10, 2
LIMIT = 1e-5
START_SECONDS = 120.0  # that a start may take, on a machine that others use too
LINGER = 0.4  # seconds at most that the other ranks live on
SLOW = 0.015  # seconds at most that a file operation is slowed by, before and after
WORDS = "a red hat and an old cat ran over every hill to find the one big tree that sat by some long river".split()
LAYOUTS: list[dict[str, Any]] = [
    {"zero": 1},
    {"zero": 3},
    {"dp": 2, "zero": 3},
    {"dp": 2, "zero": 1},
    {"tp": 2, "zero": 3},
    {"pp": 2, "zero": 1, "schedule": "zb-h1"},
    {"cp": 2, "zero": 2},
    {"dp": 2, "tp": 2, "zero": 3},
    {"dp": 2, "pp": 2, "zero": 2},
    {"pp": 2, "zero": 3, "schedule": "interleaved", "virtual_stages": 2},
    {"dp": 4, "zero": 3},
    {"dp": 3, "zero": 2},
]


class Failure(AssertionError):
    """What does not hold."""


def world_of(layout: dict[str, Any]) -> int:
    return int(np.prod([layout.get(axis, 1) for axis in ("dp", "tp", "pp", "cp")]))


def make_home(home: Path) -> None:
    """Tokenizer and shards, made from a little text."""
    texts = [" ".join(random.Random(i).choices(WORDS, k=80)) + f" ({i})\n" for i in range(120)]
    train_tokenizer(iter(texts), vocab_size=300, out=home / "tokenizer.model")
    (home / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with redirect_stdout(open(os.devnull, "w")):
        prepare([home / "train.jsonl"], home / "tokenizer.model", home / "train", workers=1)


@dataclass(frozen=True)
class Start:
    """One start of a run: where, how it is laid out and saved."""

    home: Path
    folder: Path
    layout: dict[str, Any]
    checkpoint: dict[str, Any]
    nodes: int = 1
    slow: float = 0.0

    def config(self) -> Path:
        values = {
            "name": "chaos",
            "folder": str(self.folder / "run"),
            "model": {
                "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
                "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
            },
            "parallel": {"micro_batch": 1, **self.layout},
            "data": {
                "tokenizer": str(self.home / "tokenizer.model"), "train": [{"shards": str(self.home / "train")}],
                "seq_len": 32,
            },
            "optim": {"lr": 3e-3, "warmup_steps": 2},
            "train": {"steps": STEPS, "global_batch": 12, "device": "cpu", "timeout_seconds": 60},
            "checkpoint": {"every": EVERY, **self.checkpoint},
            "eval": {"perplexity": False},
            "metrics": {"tensorboard": False, "peak_tflops": 1.0},
        }  # fmt: skip
        path = self.folder / "run.yaml"
        path.write_text(yaml.safe_dump(values))
        return path


def rank_main(rank: int, world: int, port: int, config: str, log: str, node: int, slow: float) -> None:
    """A rank's process."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "NODE": str(node), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    if slow:
        slow_down(slow, random.Random())
    os._exit(llama_dist(["train", config]))


def slow_down(most: float, rng: random.Random) -> None:
    """Make what changes files take its time, as storage that many use does."""
    for name in ("fsync", "rename", "unlink", "rmdir"):
        plain = getattr(os, name)

        def slowed(*args: Any, plain: Any = plain, **options: Any) -> Any:
            time.sleep(rng.uniform(0, most))
            try:
                return plain(*args, **options)
            finally:
                time.sleep(rng.uniform(0, most))

        setattr(os, name, slowed)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Running:
    """The processes of a start."""

    def __init__(self, start: Start) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.log, world, port = start.folder / "log", world_of(start.layout), free_port()
        self.log.touch()
        self.written_before = self.log.stat().st_size
        self.processes: list[BaseProcess] = []
        config = str(start.config())
        for rank in range(world):
            node = rank * start.nodes // world
            arguments = rank, world, port, config, str(self.log), node, start.slow
            process = context.Process(target=rank_main, args=arguments, daemon=True)
            process.start()
            self.processes.append(process)

    def said(self) -> str:
        with open(self.log, "rb") as file:
            file.seek(self.written_before)
            return file.read().decode(errors="replace")

    def end(self, *, kill: bool = False) -> list[int | None]:
        """Wait for all, and return their exit statuses."""
        deadline = time.monotonic() + START_SECONDS
        for process in self.processes:
            if kill:
                process.kill()  # of one that has ended, nothing
            process.join(max(deadline - time.monotonic(), 0.1))
        if any(process.is_alive() for process in self.processes):
            for process in self.processes:
                process.kill()
            raise Failure(f"did not end within {START_SECONDS:.0f} s:\n{self.said()[-3000:]}")
        return [process.exitcode for process in self.processes]


@dataclass
class Trial:
    """One run, killed and started again. `seed` decides everything but the instants of the machine."""

    seed: str
    home: Path
    folder: Path
    counts: Counter = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.waits_for = self.rng.choice(("in a save", "in a save", "in a prune", None))
        self.same_layout = self.rng.random() < 0.3
        self.asynchronous = self.rng.random() < 0.7
        self.local = self.rng.random() < 0.3
        self.keep = self.rng.choice((1, 1, 2, 3))
        self.run, self.disks = self.folder / "run", self.folder / "disks"

    def go(self) -> list[dict[str, Any]]:
        """Returns the layouts of the starts."""
        layouts = [self.rng.choice(LAYOUTS)]
        for _ in range(self.rng.choice((1, 1, 2))):
            self.kill_once(self.start(layouts[-1]))
            layouts.append(layouts[0] if self.same_layout else self.rng.choice(LAYOUTS))
        self.finish(self.start(layouts[-1]))
        return layouts

    def start(self, layout: dict[str, Any]) -> Start:
        checkpoint: dict[str, Any] = {"keep": self.keep, "asynchronous": self.asynchronous}
        if self.local:
            checkpoint["local"] = {"folder": str(self.disks / "$NODE"), "every": 1}
        return Start(
            self.home,
            self.folder,
            layout,
            checkpoint,
            nodes=min(2, world_of(layout)) if self.local else 1,
            slow=SLOW if self.waits_for else 0.0,
        )

    def kill_once(self, start: Start) -> None:
        expected = self.newest(start)
        running = Running(start)
        stepping = self.wait_for_instant(running)
        victim = self.rng.choice(running.processes)
        if victim.is_alive():
            victim.kill()
            kinds = self.under_way() or ["while it stepped" if stepping else "at its start"]
            self.counts[f"killed {' and '.join(kinds)}"] += 1
            time.sleep(self.rng.uniform(0, LINGER))
        else:
            self.counts["ended before the kill"] += 1
        running.end(kill=True)
        self.check_resumed(running, expected, must_have_begun=False)
        if self.local and world_of(start.layout) > 1 and self.rng.random() < 0.4:
            shutil.rmtree(self.disks / str(self.rng.randrange(2)), ignore_errors=True)
            self.counts["a node's disk was lost"] += 1

    def wait_for_instant(self, running: Running) -> bool:
        """Whether the run had begun to step when the instant came."""
        deadline = time.monotonic() + START_SECONDS
        after_steps = self.rng.choice((0, 0, 2, 4, 6))
        while time.monotonic() < deadline and all(process.is_alive() for process in running.processes):
            steps = running.said().count("step ")
            if self.waits_for is None:
                time.sleep(self.rng.uniform(0, 0.3) if steps else self.rng.uniform(0, 4))
                return running.said().count("step ") > 0
            if steps >= after_steps and self.waits_for in self.under_way():
                time.sleep(self.rng.uniform(0, 8 * SLOW))
                return True
            time.sleep(0.001)
        return True

    def under_way(self) -> list[str]:
        """What is under way in the run folder or on the nodes' disks, or was when the processes ended."""
        names: list[str] = []
        for folder in (self.run / "checkpoints", *self.disks.glob("*/*")):
            with suppress(FileNotFoundError):
                names += os.listdir(folder)
        kinds = {"in a save": ".partial-", "in a prune": ".pruned"}
        return [kind for kind, mark in kinds.items() if any(mark in name for name in names)]

    def newest(self, start: Start) -> tuple[int, int]:
        """The newest step that was committed to shared storage, and the newest that the start may find at all."""
        _, names = checkpoints_at(self.run) if self.run.is_dir() else (None, [])
        shared = max(map(step_of, names), default=0)
        local = [
            int(found[1]) for path in self.disks.glob("*/*/*") if (found := re.fullmatch(r"step-(\d+)", path.name))
        ] if self.local else []  # fmt: skip
        return shared, max([shared, *local])

    def check_resumed(self, running: Running, expected: tuple[int, int], *, must_have_begun: bool) -> None:
        said = running.said()
        found = re.search(r"(?:resumed from \S*step-|the run is finished: it stands at step )(\d+)", said)
        if "Traceback" in said and must_have_begun:
            raise Failure(f"a traceback:\n{said[-3000:]}")
        if found is None and not must_have_begun and "step  1/" not in said and "step  2/" not in said:
            return  # killed before it looked
        step = int(found[1]) if found else 0
        if not expected[0] <= step <= expected[1]:
            raise Failure(f"went on from step {step}, and {expected} were committed:\n{said[-3000:]}")

    def finish(self, start: Start) -> None:
        expected = self.newest(start)
        running = Running(start)
        statuses = running.end()
        if any(statuses):
            raise Failure(f"ended with {statuses}:\n{running.said()[-3000:]}")
        self.check_resumed(running, expected, must_have_begun=True)
        place, names = checkpoints_at(self.run)
        if not names or step_of(names[0]) != STEPS or len(names) > self.keep:
            raise Failure(f"checkpoints are {names}, keep {self.keep}")
        for name in names:
            if problems := problems_of(place, name, full=True):
                raise Failure(f"{name}: {problems}")
        if self.under_way():
            raise Failure(f"left over: {sorted((self.run / 'checkpoints').iterdir())}")


def curve_of(run: Path) -> list[tuple[float, float]]:
    steps = read_metrics(run / "metrics.jsonl")
    if [step["step"] for step in steps] != list(range(1, STEPS + 1)):
        raise Failure(f"metrics of steps {[step['step'] for step in steps]}")
    return [(step["loss"], step["grad_norm"]) for step in steps]


class Chaos:
    """All trials; undisturbed runs are made once for each layout that is asked for."""

    def __init__(self, home: Path, seed: int) -> None:
        self.home, self.seed = home, seed
        self.counts: Counter = Counter()
        self.failed: dict[int, str] = {}
        self._curves: dict[str, list[tuple[float, float]]] = {}
        self._lock = threading.Lock()

    def undisturbed(self, layout: dict[str, Any]) -> list[tuple[float, float]]:
        key = json.dumps(layout)
        with self._lock:
            if key not in self._curves:
                folder = Path(tempfile.mkdtemp(dir=self.home))
                running = Running(Start(self.home, folder, layout, {}))
                if any(running.end()):
                    raise Failure(f"undisturbed run:\n{running.said()[-3000:]}")
                self._curves[key] = curve_of(folder / "run")
                shutil.rmtree(folder)
            return self._curves[key]

    def trial(self, number: int, *, keep: bool = False) -> None:
        folder = Path(tempfile.mkdtemp(prefix=f"trial-{number}-", dir=self.home))
        trial = Trial(f"{self.seed}-{number}", self.home, folder)
        try:
            layouts = trial.go()
            curve, plain = curve_of(trial.run), self.undisturbed(LAYOUTS[0])
            np.testing.assert_allclose(curve, plain, rtol=LIMIT, err_msg="not the curve of one process")
            if all(layout == layouts[0] for layout in layouts):
                if curve != self.undisturbed(layouts[0]):
                    raise Failure(f"on {layouts[0]} alone, and not to the bit the undisturbed run")
                trial.counts["to the bit"] += 1
        except Exception as error:  # any, so that the others go on
            self.failed[number] = f"{type(error).__name__}: {error}"
        if not keep and number not in self.failed:
            shutil.rmtree(folder)
        with self._lock:
            self.counts.update(trial.counts)
            self.counts["trials"] += 1


def run_trials(home: Path, numbers: list[int], *, seed: int, processes: int, keep: bool = False) -> Chaos:
    """Run trials, so many at a time, in `home`, which has been made; those that fail leave their folders there."""
    chaos = Chaos(home, seed)
    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(lambda number: chaos.trial(number, keep=keep), numbers))
    return chaos


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2, help="trials at a time")
    parser.add_argument("--only", type=int, help="the number of one trial; its folder stays")
    args = parser.parse_args()
    home, began = Path(tempfile.mkdtemp(prefix="chaos-")), time.monotonic()
    make_home(home)
    numbers = list(range(args.trials)) if args.only is None else [args.only]
    chaos = run_trials(home, numbers, seed=args.seed, processes=args.processes, keep=args.only is not None)
    for number, text in sorted(chaos.failed.items()):
        print(f"trial {number} FAILED (--seed {args.seed} --only {number}): {text}\n")
    print(f"{chaos.counts.pop('trials')} trials, seed {args.seed}, in {(time.monotonic() - began) / 60:.1f} minutes")
    for what, count in sorted(chaos.counts.items()):
        print(f"  {what:<24} {count}")
    if args.only is not None or chaos.failed:
        print(f"folders: {home}")
    else:
        shutil.rmtree(home)
    print(f"{len(chaos.failed)} failed")
    return int(bool(chaos.failed))


if __name__ == "__main__":
    sys.exit(main())
