"""Whole runs in real processes: killed, asked to stop, moved to other layouts, damaged; the curve stays the same."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from llama_dist.checkpoint.places import LocalPlace
from llama_dist.checkpoint.whole import read_whole
from llama_dist.cli import main
from llama_dist.data.prepare import prepare
from llama_dist.data.vocabulary import train_tokenizer
from llama_dist.train.metrics import read_metrics

REPO = Path(__file__).resolve().parents[2]
STEPS, EVERY, RANKS = 24, 6, 2
EXIT_STOPPED = 75
RUN_SECONDS = 240.0  # a run takes about ten seconds; a machine that others use too may need many more
WORDS = "a red hat and an old cat ran over every hill to find the one big tree that sat by some long river".split()


@dataclass(frozen=True)
class Ended:
    status: int
    output: str
    seconds: float


@dataclass
class Started:
    """A run that `launch/local.sh` was asked for."""

    process: subprocess.Popen[str]
    folder: Path
    attempts_before: int

    def wait_for_step(self, step: int) -> None:
        """Return as soon as this start has done the given step."""
        attempt = None
        deadline = time.monotonic() + RUN_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            attempt = attempt or self._attempt()
            if attempt and any(line["attempt"] == attempt and line["step"] >= step for line in steps_of(self.folder)):
                return
            time.sleep(0.01)
        self.process.kill()
        pytest.fail(f"step {step} never came:\n{self.process.communicate()[0]}")

    def _attempt(self) -> int | None:
        """The number of this start, once it has one that did not exist before."""
        numbers = sorted(int(path.stem) for path in self.folder.glob("attempts/*.json"))
        return numbers[-1] if numbers and numbers[-1] > self.attempts_before else None

    def rank(self, rank: int) -> psutil.Process:
        """The process of one rank."""
        deadline = time.monotonic() + RUN_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            for child in psutil.Process(self.process.pid).children():
                with suppress(psutil.Error):  # a helper of the launcher, gone meanwhile
                    if child.environ().get("RANK") == str(rank) and "llama_dist" in child.cmdline():
                        return child
            time.sleep(0.05)
        pytest.fail(f"rank {rank} does not run")

    def end(self) -> Ended:
        """Wait until everything that the launcher started has let go of its output."""
        started_at = time.monotonic()
        output, _ = self.process.communicate(timeout=RUN_SECONDS)
        return Ended(self.process.returncode, output, time.monotonic() - started_at)


Start = Callable[..., Started]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer and shards, made from a little text."""
    home = tmp_path_factory.mktemp("resume")
    texts = [" ".join(random.Random(i).choices(WORDS, k=80)) + f" ({i})\n" for i in range(250)]
    train_tokenizer(iter(texts), vocab_size=340, out=home / "tokenizer.model")
    for name, chosen in (("train", texts[:240]), ("heldout", texts[240:]), ("other", texts[:100])):
        source = home / f"{name}.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen))
        prepare([source], home / "tokenizer.model", home / name, workers=1)
    return home


@pytest.fixture(scope="module")
def start(home: Path) -> Start:
    def start(folder: Path, *overrides: str, ranks: int = RANKS, prefix: tuple[str, ...] = ()) -> Started:
        settings = {
            "folder": folder,
            "data.tokenizer": home / "tokenizer.model",
            "data.train.0.shards": home / "train",
            "data.heldout": home / "heldout",
            "train.steps": STEPS,
            "train.timeout_seconds": 20,
            "checkpoint.every": EVERY,
            "checkpoint.keep": 10,
            "eval.every": 10,
            "eval.max_samples": 3,
            "metrics.peak_tflops": 1.0,
        }
        command = [*prefix, REPO / "launch" / "local.sh", ranks, REPO / "configs" / "run" / "tiny.yaml"]
        command += [f"{key}={value}" for key, value in settings.items()] + list(overrides)
        path = os.pathsep.join(filter(None, (str(REPO), os.environ.get("PYTHONPATH"))))
        env = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=env,
            cwd=home,
            start_new_session=True,  # a signal that a test sends reaches the ranks it names and nobody else
        )
        return Started(process, folder, attempts_before=len(list(folder.glob("attempts/*.json"))))

    return start


def steps_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return read_metrics(path) if path.is_file() else []


def curve_of(folder: Path) -> list[tuple[int, int, float, float, float]]:
    return [(s["step"], s["samples"], s["loss"], s["grad_norm"], s["lr"]) for s in steps_of(folder)]


def events_of(folder: Path, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def checkpoints_of(folder: Path) -> list[Path]:
    """Its committed checkpoints, newest first."""
    return [folder / "checkpoints" / name for name in LocalPlace(folder / "checkpoints").names()]


def newest(folder: Path) -> Path:
    return checkpoints_of(folder)[0]


def evals_of(folder: Path) -> dict[str, Any]:
    return {path.name: json.loads(path.read_text())["results"] for path in (folder / "evals").iterdir()}


def state_of(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.glob("rank-*.bin")}


@pytest.fixture(scope="module")
def undisturbed(home: Path, start: Start) -> Path:
    """The folder of a run on two ranks with ZeRO-3 that nothing happened to; it keeps all its checkpoints."""
    folder = home / "undisturbed"
    ended = start(folder).end()
    assert ended.status == 0, ended.output
    curve = curve_of(folder)
    assert [step for step, *_ in curve] == list(range(1, STEPS + 1))
    assert curve[-1][2] < curve[0][2] - 1.0, "the loss falls, so that a wrong step would show"
    assert [path.name for path in checkpoints_of(folder)] == [
        f"step-{step:08d}" for step in range(STEPS, 0, -EVERY)
    ]
    return folder


@pytest.fixture
def copied(undisturbed: Path, tmp_path: Path) -> Path:
    """A copy of that run, to damage."""
    shutil.copytree(undisturbed, tmp_path / "run")
    return tmp_path / "run"


def assert_same_run(folder: Path, undisturbed: Path) -> None:
    """Losses, gradient norms, evaluations and the final state are the same bits."""
    assert curve_of(folder) == curve_of(undisturbed)
    assert evals_of(folder) == evals_of(undisturbed)
    assert newest(folder).name == newest(undisturbed).name
    assert state_of(newest(folder)) == state_of(newest(undisturbed))
    read_whole(newest(folder))


def test_killed_ranks_and_the_curve_of_the_whole_run(start: Start, undisturbed: Path, tmp_path: Path) -> None:
    chosen = random.Random(20)
    folder, last = tmp_path / "run", 0
    for victim, steps in ((1, range(2, 8)), (0, range(6, 9))):
        run = start(folder)
        process = run.rank(victim)
        run.wait_for_step(last + chosen.choice(steps))
        process.kill()
        ended = run.end()
        assert ended.status == 128 + signal.SIGKILL, ended.output
        # By itself: the launcher would only end it after a minute. And it says why.
        assert ended.seconds < 30
        assert f"rank {1 - victim}" in ended.output
        assert "no contact with another rank" in ended.output
        last = steps_of(folder)[-1]["step"]
        assert last < STEPS - 1, "killed within the run, not after it"
    ended = start(folder).end()
    assert ended.status == 0, ended.output
    resumed = [event["step"] for event in events_of(folder, "resume")]
    assert len(resumed) == 2 and resumed[0] > 0 and resumed == sorted(resumed)
    assert_same_run(folder, undisturbed)


def is_state(path: Path) -> bool:
    """Whether a file of a run folder is of the run itself, and not of who has started it."""
    return "logs" not in path.parts and path.name != "LOCK"


def test_asked_to_stop_all_ranks_save_and_a_finished_run_says_so(
    start: Start, undisturbed: Path, tmp_path: Path
) -> None:
    folder, last = tmp_path / "run", 0
    for number, rank in ((signal.SIGINT, 1), (signal.SIGHUP, 0)):
        run = start(folder)
        process = run.rank(rank)
        run.wait_for_step(last + 5)
        process.send_signal(number)
        ended = run.end()
        assert ended.status == EXIT_STOPPED, ended.output
        stopped = events_of(folder, "stop")[-1]
        last = stopped["step"]
        assert last < STEPS - 1
        assert newest(folder).name == f"step-{last:08d}"
        assert f"at step {last} of {STEPS}; the same command goes on" in ended.output
    assert len(events_of(folder, "stop")) == 2
    ended = start(folder).end()
    assert ended.status == 0, ended.output
    assert_same_run(folder, undisturbed)

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if is_state(path)}
    ended = start(folder).end()
    assert ended.status == 0
    assert f"the run is finished: it stands at step {STEPS}, and train.steps is {STEPS}" in ended.output
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if is_state(path)}
    assert after == before, "nothing is written into a finished run"


def test_a_run_moves_between_layouts(start: Start, undisturbed: Path, copied: Path) -> None:
    exact = curve_of(undisturbed)
    three = {"tp": 2, "pp": 2, "zero": 3, "schedule": "zb-h1", "sequence_parallel": "true"}
    moves = [(2 * EVERY, 1, {"zero": 2}), (3 * EVERY, 4, three)]
    for kept, ranks, parallel in moves:
        for path in checkpoints_of(copied):
            if int(path.name.split("-")[1]) > kept:
                shutil.rmtree(path)
        ended = start(copied, *(f"parallel.{key}={value}" for key, value in parallel.items()), ranks=ranks).end()
        assert ended.status == 0, ended.output
        resumed = events_of(copied, "resume")[-1]
        assert resumed["step"] == kept
        started = events_of(copied, "start")[-1]
        assert started["zero"] == parallel["zero"]
        assert [started["layout"][axis] for axis in ("tp", "pp", "cp")] == [parallel.get(a, 1) for a in ("tp", "pp", "cp")]
        curve = curve_of(copied)
        assert [row[:2] for row in curve] == [row[:2] for row in exact]
        for (*_, loss, norm, lr), (*_, exact_loss, exact_norm, exact_lr) in zip(curve, exact, strict=True):
            assert (loss, norm) == pytest.approx((exact_loss, exact_norm), rel=1e-5)
            assert lr == exact_lr
        attempts = {row["step"]: row["attempt"] for row in steps_of(copied)}
        assert attempts[kept] < attempts[kept + 1] == attempts[STEPS]


def test_another_mixture_is_a_recorded_switch_and_a_killed_run_goes_on_in_it(
    start: Start, home: Path, undisturbed: Path, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = f"data.train=[{{shards: {home / 'train'}, name: web}}, {{shards: {home / 'other'}, weight: 3, name: new}}]"
    switched = 2 * EVERY
    for path in checkpoints_of(copied):
        if int(path.name.split("-")[1]) > switched:
            shutil.rmtree(path)
    other = tmp_path / "other"
    shutil.copytree(copied, other)

    ended = start(copied, mixed, "data.prefetch=0").end()
    assert ended.status == 0, ended.output
    sample = curve_of(undisturbed)[switched - 1][1]
    (switch,) = events_of(copied, "switch")
    assert switch["step"] == switched
    assert switch["mixture"].startswith(f"from sample {sample} on: web 25%, new 75%; it would have been: web 100%")
    assert "another mixture from sample" in ended.output
    expected = curve_of(copied)
    assert expected[:switched] == curve_of(undisturbed)[:switched] and expected[switched:] != curve_of(undisturbed)

    run = start(other, mixed, "parallel.zero=2", ranks=1)
    process = run.rank(0)
    run.wait_for_step(switched + EVERY + 1)
    process.kill()
    assert run.end().status == 128 + signal.SIGKILL
    ended = start(other, mixed, "parallel.tp=2").end()
    assert ended.status == 0, ended.output
    assert [event["step"] for event in events_of(other, "switch")] == [switched]
    assert events_of(other, "resume")[-1]["step"] == switched + EVERY
    curve = curve_of(other)
    assert [row[:2] for row in curve] == [row[:2] for row in expected]
    for (*_, loss, norm, _), (*_, exact_loss, exact_norm, _) in zip(curve, expected, strict=True):
        assert (loss, norm) == pytest.approx((exact_loss, exact_norm), rel=1e-5)

    told = {}
    for folder in (copied, other):
        for step in (switched, switched + 1, STEPS):
            assert main(["data", "why", str(folder), "--step", str(step), "--json"]) == 0
            told[folder, step] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for step in (switched, switched + 1, STEPS):
        assert told[copied, step] == told[other, step]
    assert {line["source"] for line in told[copied, switched]} == {"web"}
    assert {line["source"] for line in told[copied, STEPS]} == {"web", "new"}
    assert told[copied, switched + 1][0]["position"] == sample


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


def test_damaged_checkpoints_are_named_and_the_one_before_is_used(
    start: Start, undisturbed: Path, copied: Path
) -> None:
    checkpoints = checkpoints_of(copied)
    damaged = [checkpoints[0] / "rank-00001.bin", checkpoints[1] / "rank-00000.bin", checkpoints[2] / "MANIFEST.json"]
    flip(damaged[0])
    os.truncate(damaged[1], damaged[1].stat().st_size // 2)
    flip(damaged[2])
    # With one checkpoint kept, retention must not count the damaged ones.
    ended = start(copied, "checkpoint.keep=1").end()
    assert ended.status == 0, ended.output
    assert [event["step"] for event in events_of(copied, "resume")] == [STEPS - 3 * EVERY]
    told = [event["problem"] for event in events_of(copied, "checkpoint_passed_over")]
    assert [str(path) in problem for path, problem in zip(damaged, told, strict=True)] == [True] * 3
    flat = ended.output.replace("\n", "")
    assert all(str(path) in flat for path in damaged)
    assert_same_run(copied, undisturbed)


def test_when_every_checkpoint_is_damaged_the_run_stops_and_deletes_nothing(start: Start, copied: Path) -> None:
    for checkpoint in checkpoints_of(copied):
        flip(checkpoint / "rank-00000.bin")
    before = sorted(copied.rglob("*"))
    ended = start(copied).end()
    assert ended.status == 2, ended.output
    assert f"none of its {STEPS // EVERY} checkpoints verifies" in ended.output
    assert "Traceback" not in ended.output
    assert sorted(copied.rglob("*")) == before


@pytest.mark.parametrize("what", ["model", "shards"])
def test_another_model_or_other_data_is_refused_in_one_line(start: Start, home: Path, copied: Path, what: str) -> None:
    change, told = {
        "model": ("model.intermediate_size=128", "model.intermediate_size: 176 then, 128 now"),
        "shards": (
            f"data.train=[{{shards: {home / 'other'}, name: {home / 'train'}}}]",
            f"data.train.0: the content of source '{home / 'train'}' is not what the run has read so far",
        ),
    }[what]
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file() and is_state(path)}
    ended = start(copied, change, ranks=1).end()
    assert ended.status == 2, ended.output
    assert told in ended.output
    assert len(ended.output.strip().splitlines()) == 1
    after = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file() and is_state(path)}
    assert after == before


def test_damaged_shards_are_named_and_not_trained_on(start: Start, home: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(home / "train", bad)
    flip(bad / "00000.bin")
    settings = (f"data.train.0.shards={bad}", "train.steps=2", "checkpoint.every=0", "eval.every=0")
    ended = start(tmp_path / "run", *settings).end()
    assert ended.status == 2, ended.output
    assert f"{bad / '00000.bin'}: xxh3-128 is" in ended.output and "Traceback" not in ended.output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    ended = start(tmp_path / "run", *settings, "data.verify=false").end()
    assert ended.status == 0, ended.output


def test_a_port_that_is_taken_is_said_in_one_line(start: Start, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        prefix = ("env", f"MASTER_PORT={port}", "LLAMA_DIST_GRACE_SECONDS=0")  # rank 1 waits for what will not answer
        ended = start(tmp_path / "run", prefix=prefix).end()
    assert ended.status == 2, ended.output
    told = [line for line in ended.output.splitlines() if "llama-dist train" in line]
    assert len(told) == 1, ended.output
    assert f"MASTER_ADDR=127.0.0.1 MASTER_PORT={port}: rank 0 cannot listen" in told[0]
    assert "no contact" not in ended.output and "Traceback" not in ended.output


def test_a_run_that_diverges_stops_and_saves_nothing_of_it(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ended = start(folder, "optim.lr=1e38", "optim.warmup_steps=0", "checkpoint.every=1", "train.steps=5").end()
    assert ended.status == 1, ended.output
    assert "Traceback" not in ended.output
    assert "lower optim.lr" in ended.output
    told = events_of(folder, "diverged")
    assert len(told) == 1
    assert "samples" in told[0]["reason"]
    for path in checkpoints_of(folder):
        for data in state_of(path).values():
            assert all(math.isfinite(value) for value in memoryview(data).cast("f"))
        assert int(path.name.split("-")[1]) < told[0]["step"]


def test_a_run_whose_saves_fail_goes_on_and_says_so(start: Start, tmp_path: Path) -> None:
    """A file size limit stands in for the full disk: the tensors do not fit, metrics and ledger do."""
    folder = tmp_path / "run"
    limit = ("bash", "-c", 'ulimit -f 256; exec "$@"', "limited")
    ended = start(folder, "train.steps=12", prefix=limit).end()
    assert ended.status == 1, ended.output
    assert [step for step, *_ in curve_of(folder)] == list(range(1, 13))
    failed = events_of(folder, "save_failed")
    assert [event["step"] for event in failed] == [EVERY, 2 * EVERY]
    assert all("File too large" in event["reason"] for event in failed)
    assert "not saved" in ended.output and "the last save failed" in ended.output
    assert list((folder / "checkpoints").iterdir()) == []
