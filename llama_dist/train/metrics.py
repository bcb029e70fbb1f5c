"""Step statistics: the console line, metrics.jsonl, TensorBoard; tokens/s, MFU and memory."""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch
from rich.console import Console

from llama_dist.files import append_lines, read_json_lines
from llama_dist.runtime import device_name, peak_memory_bytes

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
GIB = 2**30

# Dense bfloat16 matrix rate in TFLOP/s from the makers' data sheets, by a part of the device's name.
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "GH200": 989.0, "B200": 2250.0, "A100": 312.0, "L40S": 362.0}


class Monitor(Protocol):
    """Where numbers are plotted (DeepSpeed's monitor)."""

    enabled: bool

    def write_events(self, events: list[tuple[str, float, int]]) -> None: ...


def peak_tflops(device: torch.device, dtype: torch.dtype, *, configured: float | None) -> float:
    """The matrix-product rate that MFU is a share of, for one device, in TFLOP/s.

    The configured figure; else the data sheet's for a known GPU; else what one large product reaches here and now.
    """
    if configured is not None:
        return configured
    if device.type == "cuda":
        name = device_name(device)
        known = [rate for part, rate in PEAK_TFLOPS.items() if part in name]
        if known and dtype == torch.bfloat16:
            return known[0]
    return _measured_tflops(device, dtype)


def _measured_tflops(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(6):
        started_at = time.perf_counter()
        # The sum's value is fetched so that a device has really finished.
        float((a @ a).sum())
        seconds.append(time.perf_counter() - started_at)
    return 2 * size**3 / min(seconds) / 1e12


def duration(seconds: float) -> str:
    """A span as people write it: 42s, 3m05s, 2h10m, 3d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def quantity(value: float) -> str:
    """A count with a unit of thousands: 950, 3.1k, 42k, 1.2M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.{1 if value < 10 * size else 0}f}{unit}"
    return f"{value:.0f}"


class StepLog:
    """Writes what each step did; used by the coordinator only."""

    def __init__(
        self,
        folder: Path,
        *,
        steps: int,
        tokens_per_step: int,
        flops_per_token: float,
        peak_flops: float,
        device: torch.device,
        monitor: Monitor,
        attempt: int,
    ) -> None:
        """`peak_flops` is that of all ranks together, in FLOP/s."""
        self._file = append_lines(folder / METRICS)
        self._console = Console(highlight=False, soft_wrap=True)
        self._monitor = monitor
        self._steps, self._tokens, self._attempt, self._device = steps, tokens_per_step, attempt, device
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._recent: deque[float] = deque(maxlen=20)
        self._since = time.perf_counter()
        self._monitor_failed = False

    def start_clock(self) -> None:
        """Begin timing the next step here, so that saves and evaluations do not count as training time."""
        self._since = time.perf_counter()

    def record(self, *, step: int, samples: int, loss: float, grad_norm: float, lr: float) -> None:
        """Write one finished step (from 1): console, metrics.jsonl and TensorBoard."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self._recent.append(seconds)
        rate = self._tokens / seconds
        mfu = self._flops_per_token * rate / self._peak_flops
        memory = peak_memory_bytes(self._device) / GIB
        eta = duration(median(self._recent) * (self._steps - step))
        fields = {"loss": loss, "grad_norm": grad_norm, "lr": lr, "tokens_per_second": round(rate, 1)}
        fields |= {"mfu": round(mfu, 4), "memory_gib": round(memory, 3), "step_seconds": round(seconds, 4)}
        self.write(step=step, samples=samples, **fields)
        wide = self._console.width >= 110 or not self._console.is_terminal
        use = f"mfu {mfu:.1%}  mem {memory:.2f} GiB  " if wide else ""
        self.say(
            f"[bold]step {step:>{len(str(self._steps))}}[/]/{self._steps}  [green]loss {loss:.4f}[/]  "
            f"grad {grad_norm:.3f}  lr {lr:.2e}  {quantity(rate)} tok/s  {use}[dim]eta {eta}[/]"
        )

    def write(self, *, step: int, samples: int, **fields: float) -> None:
        """Append one line to metrics.jsonl and the same numbers to TensorBoard. A full disk costs lines, not the run."""
        line = {"step": step, "samples": samples, "attempt": self._attempt, **fields}
        try:
            self._file.write(json.dumps(line) + "\n")
        except OSError as error:
            log.error("%s: %s; lost: %s", METRICS, error.strerror, json.dumps(line))
        if self._monitor.enabled and not self._monitor_failed:
            tags = {name if "/" in name else f"train/{name}": value for name, value in fields.items()}
            try:
                self._monitor.write_events([(tag, value, step) for tag, value in tags.items()])
            except Exception as error:  # its writer is a thread that ends at its first error, of whatever kind
                self._monitor_failed = True
                log.error("TensorBoard: %s; no more of it in this start", error)

    def reassure(self, text: str) -> None:
        """Tell who sits at a terminal what takes so long; a log has no use for it."""
        if self._console.is_terminal:
            self.say(f"[dim]{text}[/]")

    def say(self, text: str) -> None:
        """A line for the reader; `text` may hold rich markup. A console that is gone costs its lines, not the run."""
        try:
            self._console.print(text)
        except OSError as error:
            log.error("console: %s; lost: %s", error.strerror, text)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The run's step lines in order; a step done again after a restart counts with its last line only."""
    lines: dict[tuple[int, bool], dict[str, Any]] = {}
    for line in read_json_lines(path):
        if "step" in line:
            lines[line["step"], "loss" in line] = line
    return [lines[key] for key in sorted(lines) if key[1]]
