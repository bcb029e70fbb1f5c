"""What each layout costs at fixed work: speed, memory and traffic, counted beside what theory says. A Markdown table.

    python benchmarks/layouts.py                                    the questions below, in about six minutes on 2 cores
    python benchmarks/layouts.py --layouts "dp2 pp2 pp2,zb-h1"      these
    python benchmarks/layouts.py --model configs/model/llama-3m.yaml --seq-len 512 --batch 16

A layout is words with commas between them, the rest being 1 or as follows: dpN, tpN, ppN, cpN; zeroN (1), `step` for
gather: step (microbatch); sp for sequence_parallel; 1f1b, gpipe, zb-h1 or interleavedN with N virtual stages (1f1b);
`selective`, `full` or everyN for activation checkpointing (none); mbN sequences in a micro-batch, seqN positions and
batchN sequences in all (--micro-batch, --seq-len, --batch). Ranks are processes of this machine, on GPUs over NCCL
where there are enough of them, else on cores over gloo.

tokens/s are of the median step. What can be compared is `x dp`: plain data parallelism on as many ranks takes a step
after each step of the layout, so that whatever slows the machine slows both. `clean` tells in how many of the steps the
rest of the machine used less than 0.2 cores; those alone count where they are at least three. `bubble` is what the
schedule adds to a step by theory. Memory is the largest over the ranks, in MiB: `peak` of building and three steps,
above what the process held before (on the CPU resident data, on a GPU what is allocated); `state` by theory for
weights, gradients and optimizer; `kept` the activations that autograd keeps for backwards, counted (what zb-h1 holds on
to after that, for the weight gradients that it puts off, is only in `peak`). Traffic is of the rank that sends most, in
MiB a step by axis, counted / on paper (`dp`: ZeRO, over dp x cp ranks); `control`, in KiB, are norms and checks of all
kinds. `counted / paper` is of all axes and ranks: benchmarks/traffic.py says how either is got.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from ranks import PeakMemory, Ranks, busy_seconds
from traffic import AXES, OnPaper, SavedActivations, Traffic, on_paper

from llama_dist.config import RunConfig, build_config, fit_layout, load_model_config, micro_batch_of
from llama_dist.data.loader import Batch
from llama_dist.errors import UserError
from llama_dist.layout import Layout
from llama_dist.pipeline.runner import build_runner
from llama_dist.pipeline.schedule import PipelineShape, bubble
from llama_dist.runtime import Environment, pick_device, start_runtime
from llama_dist.train.session import precision_of

QUESTIONS = (
    "dp2 dp2,zero2 dp2,zero3 dp2,zero3,step",  # what does each ZeRO stage cost, and each way of gathering?
    "tp2 tp2,sp cp2",  # and the other ways to use two ranks? What does sequence parallelism change?
    "pp2,gpipe pp2 pp2,interleaved2 pp2,zb-h1",  # which schedule?
    "dp2,mb4 dp2,mb4,selective dp2,mb4,every2 dp2,mb4,full",  # what does recomputation save and cost?
    "dp2,seq2048,batch2 tp2,sp,seq2048,batch2 cp2,seq2048,batch2",  # who can hold long sequences?
    "dp4 dp2,tp2,zero3 dp2,pp2,zero3 dp2,pp2,zero3,step tp2,pp2,sp cp2,tp2,zero2 cp2,pp2,zero3",  # all together
)
SHAPE = {
    "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 4096,
}  # fmt: skip
QUICK_SHAPE = SHAPE | {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
WORDS = {
    "step": {"gather": "step"},
    "sp": {"sequence_parallel": True},
    **{word: {"schedule": word} for word in ("1f1b", "gpipe", "zb-h1")},
    **{word: {"activation_checkpointing": word} for word in ("none", "selective", "full")},
}
NUMBERED = {
    **{setting: setting for setting in ("dp", "tp", "pp", "cp", "zero")},
    "interleaved": "virtual_stages",
    "every": "activation_checkpointing",
    "mb": "micro_batch",
}
WARM_UP = 3  # steps: ZeRO-3 looks at what is used when in the first two
MIB = 2**20


@dataclass(frozen=True)
class Work:
    """What a step does, whatever the layout."""

    model: dict[str, object]
    seq_len: int
    batch: int
    micro_batch: int


@dataclass(frozen=True)
class Spec:
    """A layout as it was asked for, and the run that it means."""

    label: str
    run: RunConfig
    layout: Layout


@dataclass(frozen=True)
class Counted:
    """What one rank saw. Bytes."""

    peak: int
    kept: int
    sent: dict[str, float]
    element: int  # of a weight or an activation


class Trial:
    """One rank of one layout."""

    def __init__(self, environment: Environment, spec: Spec) -> None:
        device = pick_device(environment, device_for(spec.layout))
        self._run = spec.run
        self._runtime = start_runtime(
            environment,
            spec.layout,
            device=device,
            timeout_seconds=120,
            kv_heads=spec.run.model.num_key_value_heads,
        )
        self._dtype = precision_of(spec.run, device)
        self._batches = list(self._draw())

    def build(self) -> None:
        """Make the engine, and take the first steps."""
        self._runner = build_runner(self._run, self._runtime, dtype=self._dtype)
        for share in self._runner.engine.shares():
            share.master.fill_(1) if len(share.shape) == 1 else share.master.normal_(std=0.02)
        self._runner.engine.refresh()
        for _ in range(WARM_UP):
            self._step()

    def measure(self) -> Counted:
        """`build`, and a step each to count what is sent and what is kept."""
        with PeakMemory(self._runtime.device) as memory:
            self.build()
        with Traffic(self._runtime.groups) as traffic:
            self._step()
        with SavedActivations(self._runner.engine.stage) as activations:
            self._step()
        return Counted(memory.bytes, activations.peak, dict(traffic.sent), self._dtype.itemsize)

    def step(self) -> tuple[float, float]:
        """Wall time and CPU time of a step that all ranks begin together."""
        dist.barrier(group=self._runtime.groups.control)
        began = time.perf_counter(), time.process_time()
        self._step()
        if self._runtime.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began[0], time.process_time() - began[1]

    def _step(self) -> None:
        self._runner.train_step(self._batches)
        self._runner.engine.apply_gradients(self._run.optim.lr)

    def _draw(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self._runtime.coord.dp)
        rows = micro_batch_of(self._run, self._runtime.layout)
        for _ in range(self._run.train.global_batch // self._runtime.layout.dp // rows):
            shape = (rows, self._run.data.seq_len + 1)
            yield Batch(torch.randint(self._run.model.vocab_size, shape, generator=generator))


def device_for(layout: Layout) -> str:
    return "cuda" if torch.cuda.device_count() >= layout.world else "cpu"


def read_spec(text: str, work: Work) -> Spec:
    """UserError for words that mean nothing or do not go together."""
    parallel: dict[str, object] = {"dp": 1, "zero": 1, "micro_batch": work.micro_batch}
    sizes = {"seq": work.seq_len, "batch": work.batch}
    for word in text.split(","):
        name, number = re.fullmatch(r"(.*?)(\d*)", word).groups()
        if word in WORDS:
            parallel |= WORDS[word]
        elif name in sizes and number:
            sizes[name] = int(number)
        elif name in NUMBERED and number:
            parallel |= {NUMBERED[name]: int(number)} | ({"schedule": name} if name == "interleaved" else {})
        else:
            raise UserError(f"layout {text!r}: {word!r} means nothing; benchmarks/layouts.py --help lists the words")
    values = {
        "name": "benchmark",
        "model": work.model,
        "parallel": parallel,
        "data": {"tokenizer": "-", "train": [{"shards": "-"}], "seq_len": sizes["seq"]},
        "optim": {"lr": 1e-3},
        "train": {"steps": 1, "global_batch": sizes["batch"]},
    }
    run = build_config(RunConfig, values, where=f"layout {text!r}")
    world = run.parallel.dp * run.parallel.tp * run.parallel.pp * run.parallel.cp
    return Spec(text, run, fit_layout(run, world))


def baseline_of(spec: Spec) -> Spec:
    """Plain data parallelism on as many ranks, for the same work."""
    changes = {"dp": spec.layout.world, "micro_batch": spec.run.parallel.micro_batch, "zero": 1}
    run = spec.run.model_copy(update={"parallel": type(spec.run.parallel)(**changes)})
    return Spec(f"dp{spec.layout.world}", run, fit_layout(run, spec.layout.world))


class Baselines:
    """The ranks of the baseline that was asked for last; others are ended, so that no memory is held for nothing."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._spec: Spec | None = None
        self._ranks: Ranks | None = None

    def get(self, spec: Spec) -> Ranks:
        if self._ranks is None or self._spec != spec:
            self._stack.close()
            self._ranks, self._spec = self._stack.enter_context(Ranks(spec.layout.world, Trial, spec)), spec
            self._ranks.call("build")
        return self._ranks


@dataclass(frozen=True)
class Timing:
    """Seconds of the median step, the baseline's, and how many samples were clean of how many."""

    seconds: float
    baseline: float
    clean: int
    samples: int


def take_turns(ranks: Ranks, baseline: Ranks, steps: int) -> Timing:
    rows = []
    for _ in range(steps):
        pair = [_timed(one) for one in (ranks, baseline)]
        rows.append((pair[0][0], pair[1][0], max(others for _, others in pair)))
    clean = [row for row in rows if row[2] < 0.2]
    used = clean if len(clean) >= 3 else rows
    return Timing(statistics.median(r[0] for r in used), statistics.median(r[1] for r in used), len(clean), len(rows))


def _timed(ranks: Ranks) -> tuple[float, float]:
    """Seconds of a step on the slowest rank, and how many cores the rest of the machine used."""
    began, busy = time.perf_counter(), busy_seconds()
    times = ranks.call("step")
    others = busy_seconds() - busy - sum(cpu for _, cpu in times)
    return max(wall for wall, _ in times), max(others, 0.0) / (time.perf_counter() - began)


HEAD = (
    "layout", "micro-batches", "tokens/s", "x dp", "clean", "bubble", "peak", "state", "kept", *AXES, "counted / paper"
)  # fmt: skip


def row_of(spec: Spec, counted: list[Counted], timing: Timing) -> list[str]:
    layout, parallel = spec.layout, spec.run.parallel
    papers = [on_paper(spec.run, layout, rank, element=counted[rank].element) for rank in range(layout.world)]
    batch = spec.run.train.global_batch
    microbatches = batch // layout.dp // micro_batch_of(spec.run, layout)
    shape = PipelineShape(layout.pp, microbatches, parallel.virtual_stages)
    memory = (max(c.peak for c in counted), max(p.state for p in papers), max(c.kept for c in counted))
    return [
        spec.label,
        str(microbatches),
        f"{batch * spec.run.data.seq_len / timing.seconds:,.0f}",
        f"{timing.baseline / timing.seconds:.2f}",
        f"{timing.clean}/{timing.samples}",
        f"{bubble(parallel.schedule, shape):.0%}" if layout.pp > 1 else "-",
        *(f"{value / MIB:.1f}" for value in memory),
        *traffic_cells(counted, papers),
    ]


def traffic_cells(counted: list[Counted], papers: list[OnPaper]) -> Iterator[str]:
    busiest = max(range(len(counted)), key=lambda rank: sum(counted[rank].sent.values()))
    for axis in AXES:
        sent, paper = counted[busiest].sent[axis], papers[busiest].sent[axis]
        if axis == "control":
            yield f"{sent / 1024:.1f}"
        else:
            yield f"{sent / MIB:.2f} / {paper / MIB:.2f}" if sent or paper else "-"
    paper = sum(sum(one.sent.values()) for one in papers)
    total = sum(sum(one.sent[axis] for axis in AXES if axis != "control") for one in counted)
    yield f"{total / paper:.3f}" if paper else "-"


def print_row(cells: list[str]) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", default=" ".join(QUESTIONS), help="with spaces between them")
    parser.add_argument("--model", metavar="FILE", help="a model's YAML file; default: 5 million parameters")
    parser.add_argument("--quick", action="store_true", help="a tiny model and two steps: shows that all layouts run")
    for name, default in (("steps", 4), ("seq-len", 256), ("batch", 8), ("micro-batch", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    model = load_model_config(args.model).model_dump() if args.model else QUICK_SHAPE if args.quick else SHAPE
    work = Work(model, args.seq_len, args.batch, args.micro_batch)
    if args.quick:
        work, args.steps = replace(work, seq_len=min(work.seq_len, 64)), 2
    failed = []
    print_row(list(HEAD))
    print_row([":--", *["--:"] * (len(HEAD) - 1)])
    with ExitStack() as stack:
        baselines = Baselines(stack)
        for text in args.layouts.split():
            try:
                spec = read_spec(text, work)
                with Ranks(spec.layout.world, Trial, spec) as ranks:
                    counted = ranks.call("measure")
                    timing = take_turns(ranks, baselines.get(baseline_of(spec)), args.steps)
                print_row(row_of(spec, counted, timing))
            except (UserError, RuntimeError) as error:
                failed.append(f"{text}: {error}")
                print_row([text, "failed", *["-"] * (len(HEAD) - 2)])
    print("\n".join(failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
