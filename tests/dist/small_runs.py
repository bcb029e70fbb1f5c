"""Tiny runs for the distributed tests, and what a worker does with them. Functions with `_on_rank` run in workers."""

from __future__ import annotations

import json
import random
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from workers import pool, runtime

from llama_dist.boxes import Box
from llama_dist.checkpoint.pieces import check_coverage
from llama_dist.checkpoint.plan import state_name
from llama_dist.checkpoint.store import Position
from llama_dist.config import RunConfig, build_config
from llama_dist.data.history import History
from llama_dist.data.loader import Batch
from llama_dist.layout import Layout
from llama_dist.model.cuts import MOMENTS, logical_shapes
from llama_dist.model.llama import Documents
from llama_dist.runtime import all_reduce_sum
from llama_dist.train.coordinator import Coordinator
from llama_dist.train.ledger import open_ledger
from llama_dist.train.optim import lr_at
from llama_dist.train.finding import find_newest, open_local_level
from llama_dist.train.session import _build
from llama_dist.train.signals import StopRequest

STEPS = 8  # of a whole run: the learning rate goes by it
NO_FOLDER = str(Path(tempfile.gettempdir()) / "no-such-run")


@dataclass(frozen=True)
class Case:
    """A small run: a layout, a way to go about it, and a model. `str` and `parse` are inverse but for `folder`."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    zero: int = 3
    schedule: str = "1f1b"
    virtual_stages: int = 1
    stage_layers: tuple[int, ...] | None = None
    sequence_parallel: bool = False
    recompute: str | int = "none"
    gather: str = "microbatch"
    precision: str = "fp32"
    micro_batch: int = 1
    # From here on, what one plain process must know too.
    global_batch: int = 8
    seq_len: int = 16
    document_mask: bool = False
    masked: bool = False
    layers: int = 4
    heads: int = 8
    kv_heads: int = 2
    hidden: int = 32
    intermediate: int = 72
    vocab: int = 96
    tied: bool = False
    grad_clip: float = 0.3
    keep: int = 2
    folder: str = NO_FOLDER
    local: str | None = None

    def __str__(self) -> str:
        return "-".join(token for token in (_token(self, f.name) for f in fields(self)) if token)

    @classmethod
    def parse(cls, text: str) -> Case:
        """The case that `text` is the name of. Raises ValueError at what is not part of a name."""
        return cls(**dict(_setting(token) for token in text.split("-")))

    @property
    def layout(self) -> Layout:
        return Layout(self.dp, self.tp, self.pp, self.cp)

    @property
    def world(self) -> int:
        return self.layout.world

    @property
    def microbatches(self) -> int:
        return self.global_batch // (self.dp * self.micro_batch)

    @property
    def unlaid(self) -> Case:
        """The same model on the same data in one plain process, whatever the layout."""
        first = [f.name for f in fields(self)].index("global_batch")
        return Case(**{f.name: getattr(self, f.name) for f in fields(self)[first:]} | {"folder": NO_FOLDER, "keep": 2, "local": None})

    @property
    def run(self) -> RunConfig:
        values = {
            "name": "small",
            "folder": self.folder,
            "model": {
                "vocab_size": self.vocab,
                "hidden_size": self.hidden,
                "intermediate_size": self.intermediate,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads,
                "num_key_value_heads": self.kv_heads,
                "max_position_embeddings": 32,
                "initializer_range": 0.1,
                "tie_word_embeddings": self.tied,
            },
            "parallel": {
                "dp": self.dp,
                "tp": self.tp,
                "pp": self.pp,
                "cp": self.cp,
                "zero": self.zero,
                "schedule": self.schedule,
                "virtual_stages": self.virtual_stages,
                "stage_layers": list(self.stage_layers) if self.stage_layers else None,
                "sequence_parallel": self.sequence_parallel,
                "activation_checkpointing": self.recompute,
                "gather": self.gather,
                "micro_batch": self.micro_batch,
            },
            "data": {
                "tokenizer": "none",
                "train": [{"shards": "none"}],
                "seq_len": self.seq_len,
                "document_mask": self.document_mask,
            },
            # With a larger step or a smaller eps, these few layers turn rounding errors into larger ones step by step:
            # of two plain processes, in float32 and in float64, too. With these they stay within a third of the limits.
            "optim": {"lr": 3e-3, "eps": 1e-4, "warmup_steps": 2, "weight_decay": 0.1, "grad_clip": self.grad_clip},
            "train": {"steps": STEPS, "global_batch": self.global_batch, "seed": 7, "precision": self.precision},
            "checkpoint": {"keep": self.keep, "local": {"folder": self.local, "every": 1} if self.local else None},
        }
        return build_config(RunConfig, values, where="small run")


# How a case's settings are written in its name: NAMED ones always, the others where they are not the default.
NUMBERS = {
    "dp": "dp",
    "tp": "tp",
    "pp": "pp",
    "cp": "cp",
    "zero": "zero",
    "virtual_stages": "v",
    "micro_batch": "mb",
    "kv_heads": "kv",
    "global_batch": "batch",
    "seq_len": "seq",
    "layers": "layers",
    "heads": "heads",
    "hidden": "hidden",
    "intermediate": "wide",
    "vocab": "vocab",
    "grad_clip": "clip",
}
NAMED = ("dp", "tp", "pp", "cp", "zero", "micro_batch", "kv_heads")
WORDS: dict[str, tuple[str, Any]] = {
    "gpipe": ("schedule", "gpipe"),
    "1f1b": ("schedule", "1f1b"),
    "interleaved": ("schedule", "interleaved"),
    "zbh1": ("schedule", "zb-h1"),
    "sp": ("sequence_parallel", True),
    "full": ("recompute", "full"),
    "selective": ("recompute", "selective"),
    "stepgather": ("gather", "step"),
    "bf16": ("precision", "bf16"),
    "documents": ("document_mask", True),
    "masked": ("masked", True),
    "tied": ("tied", True),
}


def _token(case: Case, name: str) -> str:
    """How one setting is written in the name of a case; empty where it need not be."""
    value, default = getattr(case, name), getattr(Case(), name)
    named = name in NAMED or (name == "schedule" and case.pp > 1)
    if name in ("keep", "folder", "local") or (value == default and not named):
        return ""
    if name in NUMBERS:
        return f"{NUMBERS[name]}{value:g}" if isinstance(value, float) else f"{NUMBERS[name]}{value}"
    if name == "stage_layers":
        return "stages" + ".".join(map(str, value))
    if name == "recompute" and isinstance(value, int):
        return f"every{value}"
    return next(word for word, setting in WORDS.items() if setting == (name, value))


def _setting(token: str) -> tuple[str, Any]:
    if token in WORDS:
        return WORDS[token]
    parts = re.fullmatch(r"([a-z]+)([0-9.]+)", token)
    word, number = parts.groups() if parts else ("", "")
    if word == "stages":
        return "stage_layers", tuple(map(int, number.split(".")))
    if word == "every":
        return "recompute", int(number)
    for name, short in NUMBERS.items():
        if word == short:
            return name, float(number) if name == "grad_clip" else int(number)
    raise ValueError(f"{token!r} is not part of the name of a case")


def on_ranks(case: Case, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    """What `function(case, *args)` returns on each rank of the case's layout."""
    return pool(case.world).run(function, case, *args, **kwargs)


def tokens_at(case: Case, step: int) -> Tensor:
    """The global batch of a step: (global_batch, seq_len + 1), counting in steps of 1 to 3, which can be learnt."""
    generator = torch.Generator().manual_seed(1000 + step)
    start = torch.randint(0, case.vocab, (case.global_batch, 1), generator=generator)
    stride = torch.randint(1, 4, (case.global_batch, case.seq_len), generator=generator)
    return torch.cat((start, start + stride.cumsum(1)), dim=1) % case.vocab


def documents_at(case: Case, step: int) -> Documents | None:
    """Where the documents of each row begin: one to four in a row, also at its last position; None without a mask."""
    if not case.document_mask:
        return None
    chosen = random.Random(step)
    more = [min(row % 4, case.seq_len - 1) for row in range(case.global_batch)]
    rows = [{0, *chosen.sample(range(1, case.seq_len), count)} for count in more]
    rows[-1].add(case.seq_len - 1)
    return tuple(tuple(sorted(row)) for row in rows)


def counted_at(case: Case, step: int) -> Tensor | None:
    """Which targets count: bool (global_batch, seq_len); None without masks.

    From row to row ever more of them. In step 1 the first half of the rows has none, so that whole replicas have none;
    in step 2 the first half of the positions, so that ranks of the sequence have none.
    """
    if not case.masked:
        return None
    generator = torch.Generator().manual_seed(2000 + step)
    share = torch.linspace(0.2, 1, case.global_batch)[:, None]
    counted = torch.rand(case.global_batch, case.seq_len, generator=generator) < share
    if step == 1:
        counted[: case.global_batch // 2] = False
    elif step == 2:
        counted[:, : case.seq_len // 2] = False
    return counted


class SilentLog:
    """Stands in for the step log: keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def start_clock(self) -> None:
        pass


def coordinator_on_rank(case: Case, *, with_ledger: bool = False) -> Coordinator:
    """Engine, runner and coordinator, built by the function that builds those of users; no weights until restored."""
    run, place = case.run, runtime(case.layout, kv_heads=case.kv_heads)
    ledger = None
    if place.is_coordinator and with_ledger:
        Path(case.folder).mkdir(parents=True, exist_ok=True)
        ledger = open_ledger(Path(case.folder))
    return _build(
        run,
        place,
        history=History((), (), ()),
        evaluation=SimpleNamespace(tokenizer=SimpleNamespace(fingerprint="none")),
        request=StopRequest(),
        ledger=ledger,
        attempt=1,
        steps_log=SilentLog() if ledger else None,
        local=open_local_level(run, place.groups),
    )


def restore_on_rank(coordinator: Coordinator) -> Position:
    """Go on from the newest checkpoint of the run's folder that verifies, or draw the first weights."""
    return coordinator.restore(find_newest(coordinator.run, coordinator.local, group=coordinator.runtime.groups.control))


def microbatches_on_rank(coordinator: Coordinator, case: Case, step: int) -> list[Batch]:
    """This replica's contiguous slice of the step's global batch, in micro-batches."""
    whole = (tokens_at(case, step), documents_at(case, step), counted_at(case, step))
    share = case.global_batch // case.dp
    first = coordinator.runtime.coord.dp * share
    starts = range(first, first + share, case.micro_batch)
    parts = [slice(start, start + case.micro_batch) for start in starts]
    return [Batch(*(None if rows is None else rows[part] for rows in whole)) for part in parts]


def steps_on_rank(coordinator: Coordinator, case: Case, position: Position, count: int) -> list[tuple[float, float]]:
    """Train `count` steps; the (loss, gradient norm) of each."""
    curve = []
    for step in range(position.step, position.step + count):
        part = coordinator.runner.train_step(microbatches_on_rank(coordinator, case, step))
        coordinator.saves.before_update()
        norm = coordinator.engine.apply_gradients(lr_at(coordinator.run.optim, step, steps=STEPS))
        curve.append((all_reduce_sum([float(part)], group=coordinator.runtime.groups.control)[0], norm))
    return curve


def position_at(step: int, *, global_batch: int = 8) -> Position:
    return Position(step, step * global_batch)


@dataclass(frozen=True)
class Held:
    """What a rank has of a logical tensor; one rank of those that have the same box is its `owner`."""

    name: str
    box: Box
    owner: bool
    data: np.ndarray


def state_on_rank(coordinator: Coordinator) -> list[Held]:
    """Copies of all that this rank holds: boxes of the float32 weights and of both moments."""
    return [Held(p.name, p.box, p.owner, p.data.numpy().copy()) for p in coordinator.pieces()]


State = dict[str, dict[str, np.ndarray]]


def assemble(case: Case, ranks: list[list[Held]]) -> State:
    """Logical tensors (weight and moments by name) out of what all ranks hold.

    What is owned must cover each tensor exactly once; what another rank has a copy of must be the same bits.
    """
    whole: State = {}
    for name, shape in logical_shapes(case.run.model).items():
        whole[name] = {
            key: _join(key_name, shape, [held for rank in ranks for held in rank if held.name == key_name])
            for key, key_name in [("master", name), *((moment, state_name(moment, name)) for moment in MOMENTS)]
        }
    known = {n for name in whole for n in (name, *(state_name(moment, name) for moment in MOMENTS))}
    assert {held.name for rank in ranks for held in rank} == known, "a rank holds what the model does not have"
    return whole


def _join(name: str, shape: tuple[int, ...], parts: list[Held]) -> np.ndarray:
    check_coverage(name, shape, [held.box for held in parts if held.owner])
    joined = np.empty(shape, dtype=np.float32)
    for held in parts:
        if held.owner:
            joined[held.box.slices] = held.data
    for held in parts:
        assert held.data.dtype == np.float32, f"{name} is held in {held.data.dtype}"
        assert np.array_equal(joined[held.box.slices], held.data), f"{name}: the copies of {held.box} have come apart"
    return joined


def ledger_events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
