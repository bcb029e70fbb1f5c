"""Tiny runs for the distributed tests, and what a worker does with them. Functions with `_on_rank` run in workers."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from workers import runtime

from llama_dist.checkpoint.store import Position, newest_valid
from llama_dist.config import RunConfig, build_config
from llama_dist.eval.scoring import Replica
from llama_dist.model.cuts import logical_shapes
from llama_dist.pipeline.engine import StageEngine
from llama_dist.pipeline.partitions import MOMENTS
from llama_dist.pipeline.runner import PipelineRunner
from llama_dist.pipeline.stage import build_stage
from llama_dist.runtime import all_reduce_sum
from llama_dist.train.coordinator import Coordinator
from llama_dist.train.ledger import open_ledger
from llama_dist.train.optim import lr_at
from llama_dist.train.signals import StopRequest

MODEL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.1,
}
SEQ_LEN = 16
GLOBAL_BATCH = 8
STEPS = 8


@dataclass(frozen=True)
class Case:
    """What varies between the runs; everything else is the same in all of them."""

    zero: int = 3
    micro_batch: int = 1
    recompute: str | int = "none"
    tied: bool = False
    kv_heads: int = 2
    precision: str = "fp32"
    grad_clip: float = 0.3
    keep: int = 2
    folder: str = field(default_factory=lambda: str(Path(tempfile.gettempdir()) / "no-such-run"))

    def __str__(self) -> str:
        return (
            f"zero{self.zero}-mb{self.micro_batch}-{self.recompute}-kv{self.kv_heads}-{self.precision}"
            f"{'-tied' if self.tied else ''}"
        )

    @property
    def run(self) -> RunConfig:
        parallel = {"zero": self.zero, "micro_batch": self.micro_batch, "activation_checkpointing": self.recompute}
        values = {
            "name": "small",
            "folder": self.folder,
            "model": MODEL | {"tie_word_embeddings": self.tied, "num_key_value_heads": self.kv_heads},
            "parallel": parallel,
            "data": {"tokenizer": "none", "train": [{"shards": "none"}], "seq_len": SEQ_LEN},
            "optim": {"lr": 1e-2, "eps": 1e-6, "warmup_steps": 2, "weight_decay": 0.1, "grad_clip": self.grad_clip},
            "train": {"steps": STEPS, "global_batch": GLOBAL_BATCH, "seed": 7},
            "checkpoint": {"keep": self.keep},
        }
        return build_config(RunConfig, values, where="small run")


def tokens_at(step: int) -> Tensor:
    """The global batch of a step: (GLOBAL_BATCH, SEQ_LEN + 1), counting in steps of 1 to 3, which can be learnt."""
    generator = torch.Generator().manual_seed(1000 + step)
    start = torch.randint(0, MODEL["vocab_size"], (GLOBAL_BATCH, 1), generator=generator)
    stride = torch.randint(1, 4, (GLOBAL_BATCH, SEQ_LEN), generator=generator)
    return torch.cat((start, start + stride.cumsum(1)), dim=1) % MODEL["vocab_size"]


class SilentLog:
    """Stands in for the step log: keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def start_clock(self) -> None:
        pass


def coordinator_on_rank(case: Case, *, with_ledger: bool = False) -> Coordinator:
    """Engine, runner and coordinator of a run, as `train.session` builds them; the weights are zero until restored."""
    run, place = case.run, runtime()
    stage = build_stage(run.model, pp=1, pp_rank=0, activation_checkpointing=case.recompute)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[case.precision]
    engine = StageEngine(stage, run, place, dtype=dtype)
    ledger = None
    if place.is_coordinator and with_ledger:
        Path(case.folder).mkdir(parents=True, exist_ok=True)
        ledger = open_ledger(Path(case.folder))
    return Coordinator(
        run=run,
        runtime=place,
        engine=engine,
        runner=PipelineRunner(engine, place, schedule="1f1b"),
        evaluation=None,
        replica=Replica(group=place.groups.control, dp=place.layout.dp, dp_rank=place.coord.dp),
        request=StopRequest(),
        attempt=1,
        data_fingerprint="the data",
        tokenizer_fingerprint="none",
        ledger=ledger,
        steps_log=SilentLog() if ledger else None,
    )


def restore_on_rank(coordinator: Coordinator) -> Position:
    """Go on from the newest checkpoint of the run's folder that verifies, or draw the first weights."""
    checkpoints = Path(coordinator.run.folder) / "checkpoints"
    checkpoint, _ = newest_valid(checkpoints, group=coordinator.runtime.groups.control)
    return coordinator.restore(checkpoint)


def microbatches_on_rank(case: Case, step: int) -> list[Tensor]:
    """This replica's contiguous slice of the step's global batch, in micro-batches."""
    share = GLOBAL_BATCH // dist.get_world_size()
    first = dist.get_rank() * share
    return list(tokens_at(step)[first : first + share].split(case.micro_batch))


def steps_on_rank(coordinator: Coordinator, case: Case, position: Position, count: int) -> list[tuple[float, float]]:
    """Train `count` steps; the (loss, gradient norm) of each."""
    curve = []
    for step in range(position.step, position.step + count):
        part = coordinator.runner.train_step(microbatches_on_rank(case, step))
        norm = coordinator.engine.apply_gradients(lr_at(coordinator.run.optim, step, steps=STEPS))
        curve.append((all_reduce_sum([float(part)], group=coordinator.runtime.groups.control)[0], norm))
    return curve


def position_at(step: int) -> Position:
    return Position(step, step * GLOBAL_BATCH)


Shares = list[tuple[str, int, int, dict[str, np.ndarray]]]


def state_on_rank(coordinator: Coordinator) -> Shares:
    """Copies of this rank's shares: (name, start, stop, arrays of the float32 weight and both moments)."""
    return [
        (s.name, s.start, s.stop, {key: getattr(s, key).numpy().copy() for key in ("master", *MOMENTS)})
        for s in coordinator.engine.shares()
    ]


def assemble(case: Case, shares_of_ranks: list[Shares]) -> dict[str, dict[str, np.ndarray]]:
    """Logical tensors out of all ranks' shares, which must cover each exactly once."""
    whole: dict[str, dict[str, np.ndarray]] = {}
    for name, shape in logical_shapes(case.run.model).items():
        parts = sorted((start, stop, arrays) for shares in shares_of_ranks for n, start, stop, arrays in shares if n == name)
        edges = [0, *(stop for _, stop, _ in parts)]
        assert [start for start, _, _ in parts] == edges[:-1], f"{name}: shares do not join: {edges}"
        assert edges[-1] == np.prod(shape), f"{name}: shares end at {edges[-1]} of {shape}"
        whole[name] = {
            key: np.concatenate([arrays[key] for *_, arrays in parts]).reshape(shape) for key in ("master", *MOMENTS)
        }
    return whole


def ledger_events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
