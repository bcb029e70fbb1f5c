"""Step statistics: the numbers on the console, in metrics.jsonl and for TensorBoard are the same and are right."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from llama_dist.train import metrics as module
from llama_dist.train.metrics import StepLog, duration, peak_tflops, quantity, read_metrics

CPU = torch.device("cpu")


class FakeMonitor:
    """Keeps what would be plotted."""

    def __init__(self, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self.events: list[tuple[str, float, int]] = []

    def write_events(self, events: list[tuple[str, float, int]]) -> None:
        self.events += events


def step_log(folder: Path, monitor: FakeMonitor, *, attempt: int = 1) -> StepLog:
    return StepLog(
        folder,
        steps=100,
        tokens_per_step=4096,
        flops_per_token=1e6,
        peak_flops=8.192e9,
        device=CPU,
        monitor=monitor,
        attempt=attempt,
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that `perf_counter` tells, to be set by a test."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def test_a_step_is_timed_and_its_rates_follow(
    tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    monitor = FakeMonitor()
    log = step_log(tmp_path, monitor)
    clock[0] = 50.0
    log.start_clock()  # what came before is not a step
    clock[0] = 52.0
    log.record(step=10, samples=160, loss=3.25, grad_norm=0.5, lr=1e-3)

    [line] = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (line["step"], line["samples"], line["attempt"]) == (10, 160, 1)
    assert (line["loss"], line["grad_norm"], line["lr"]) == (3.25, 0.5, 1e-3)
    assert line["step_seconds"] == 2.0
    assert line["tokens_per_second"] == 2048.0
    assert line["mfu"] == 0.25  # 2048 tokens/s at 1e6 FLOP each, of 8.192e9
    assert 0.01 < line["memory_gib"] < 200
    said = capsys.readouterr().out
    assert "step  10/100  loss 3.2500  grad 0.500  lr 1.00e-03  2.0k tok/s  mfu 25.0%  mem " in said
    assert said.endswith("eta 3m00s\n")  # 90 steps of 2 seconds
    plotted = {tag: value for tag, value, step in monitor.events if step == 10}
    assert plotted["train/loss"] == 3.25 and plotted["train/tokens_per_second"] == 2048.0


def test_evaluations_are_plotted_under_their_own_names(tmp_path: Path) -> None:
    monitor = FakeMonitor()
    step_log(tmp_path, monitor).write(step=5, samples=80, **{"eval/heldout/loss": 4.5})
    assert monitor.events == [("eval/heldout/loss", 4.5, 5)]


def test_without_tensorboard_nothing_is_plotted(tmp_path: Path) -> None:
    monitor = FakeMonitor(enabled=False)
    step_log(tmp_path, monitor).write(step=5, samples=80, loss=4.5)
    assert monitor.events == []


def test_the_time_left_is_that_of_a_usual_step(
    tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    log = step_log(tmp_path, FakeMonitor())
    for step, seconds in enumerate((1.0, 1.0, 60.0), start=1):  # one slow step does not change the estimate
        clock[0] += seconds
        log.record(step=step, samples=0, loss=1.0, grad_norm=1.0, lr=1.0)
    assert capsys.readouterr().out.endswith("eta 1m37s\n")


def test_a_step_done_again_counts_once_and_a_line_cut_short_spoils_nothing(tmp_path: Path) -> None:
    first = step_log(tmp_path, FakeMonitor())
    for step in (1, 2):
        first.write(step=step, samples=step, loss=5.0)
    first.write(step=2, samples=2, **{"eval/heldout/loss": 9.0})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "samp')  # a kill in the middle of a write

    second = step_log(tmp_path, FakeMonitor(), attempt=2)
    for step in (2, 3):
        second.write(step=step, samples=step, loss=4.0)
    steps = read_metrics(path)
    assert [(s["step"], s["attempt"], s["loss"]) for s in steps] == [(1, 1, 5.0), (2, 2, 4.0), (3, 2, 4.0)]


def test_the_peak_is_configured_known_or_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_tflops(CPU, torch.float32, configured=1.5) == 1.5
    assert 0.0001 < peak_tflops(CPU, torch.float32, configured=None) < 100
    monkeypatch.setattr(module, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(module, "_measured_tflops", lambda device, dtype: -1.0)
    gpu = torch.device("cuda", 0)
    assert peak_tflops(gpu, torch.bfloat16, configured=None) == 989.0
    assert peak_tflops(gpu, torch.float32, configured=None) == -1.0  # the data sheet's figure is for bfloat16
    monkeypatch.setattr(module, "device_name", lambda device: "Some new GPU")
    assert peak_tflops(gpu, torch.bfloat16, configured=None) == -1.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.6, "1m00s"), (185, "3m05s"), (7800, "2h10m"), (273600, "3d04h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (950, "950"), (3140, "3.1k"), (41_900, "42k"), (1_230_000, "1.2M"), (6.738e9, "6.7G")],
)
def test_quantity(value: float, text: str) -> None:
    assert quantity(value) == text


class FullMonitor(FakeMonitor):
    """TensorBoard on a full disk: its writer's thread ends, and every later event fails."""

    def write_events(self, events: list[tuple[str, float, int]]) -> None:
        super().write_events(events)
        raise OSError(28, "No space left on device")


def test_a_full_disk_costs_tensorboard_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    monitor = FullMonitor()
    log = step_log(tmp_path, monitor)
    for step in (1, 2):
        log.write(step=step, samples=step, loss=1.0)
    assert len(monitor.events) == 1, "not tried again"
    assert "TensorBoard: [Errno 28] No space left on device" in caplog.text
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_console_that_is_gone_costs_its_lines_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = step_log(tmp_path, FakeMonitor())
    with open("/dev/full", "w") as full:
        log._console.file = full
        log.say("x" * 100_000)
        log.record(step=1, samples=1, loss=1.0, grad_norm=1.0, lr=1.0)
        log._console.file = sys.stdout
        with suppress(OSError):
            full.close()
    assert "console: No space left on device" in caplog.text
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_an_object_without_a_step_is_no_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{}\n{"step": 1, "loss": 2.0}\n')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
