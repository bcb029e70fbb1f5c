"""What a rank holds while it builds its part of the model: at most its share and one module. Two Markdown tables.

    python benchmarks/construction.py                         70B planned on meta, then a part of 1.1B built for real
    python benchmarks/construction.py --layers 22             all of the 1.1B: 21 GiB of memory over four ranks
    python benchmarks/construction.py --planned configs/model/llama3.1-405b.yaml --plan tp8,pp16,dp8

The first table builds the stage of one rank of each pipeline rank on the meta device, for a layout that no machine at
hand could run: how long that takes, what memory it takes (`held`, which must be small), and the bytes that the rank
will hold under ZeRO-3 in bfloat16: its `share` of weights, gradients, float32 masters and moments (2 + 4 + 12 bytes for
each parameter of the stage after tensor parallelism, over dp), and the largest `module`, which is whole while it is
shared out.

The second builds TinyLlama's shape in four processes, pp=2 x dp=2, ZeRO-3, float32: engine, optimizer and initial
weights. A `peak` is the most memory a rank held until then, beyond what it held before (resident on the CPU, allocated
on a GPU), over its bound: `weights` when these are shared out, 4 bytes for each parameter of the stage over dp, and the
largest module; `all` at the end, 20 bytes and the largest module. `reserved` counts what was asked for and not yet
written to as well, which on a GPU is held too. Layers are left out until the shares of all ranks fit two thirds of the
memory that is free.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from layouts import Spec, Work, device_for, read_spec
from ranks import PeakMemory, Ranks, data_bytes
from torch import nn

from llama_dist.config import ModelConfig, load_model_config
from llama_dist.layout import Layout
from llama_dist.model.cuts import num_parameters
from llama_dist.model.init import draw
from llama_dist.model.stages import stage_layers
from llama_dist.parallel.tensor import TensorParallel
from llama_dist.pipeline import engine
from llama_dist.pipeline.engine import partition_
from llama_dist.pipeline.runner import build_runner
from llama_dist.pipeline.stage import Stage, build_stage
from llama_dist.runtime import Environment, pick_device, start_runtime
from llama_dist.train.session import precision_of

MODELS = Path(__file__).resolve().parents[1] / "configs" / "model"
GIB = 2**30
STATE = 4 + 12  # bytes of a parameter's gradient, float32 master and moments; the weight comes on top


@dataclass(frozen=True)
class Built:
    """What one rank found. Bytes, but for `parameters`."""

    parameters: int  # of the stage, tensor parallelism taken off
    module: int
    element: int  # of a weight
    weights_peak: int  # until the weights are shared out
    peak: int
    reserved: int


class Builder:
    """One rank that builds its part for real."""

    def __init__(self, environment: Environment, spec: Spec) -> None:
        device = pick_device(environment, device_for(spec.layout))
        self._spec = spec
        self._runtime = start_runtime(
            environment, spec.layout, device=device, timeout_seconds=600, kv_heads=spec.run.model.num_key_value_heads
        )

    def build(self) -> Built:
        """From nothing to initial weights in the engine."""
        run = self._spec.run
        dtype = precision_of(run, self._runtime.device)
        weights_peak = 0

        def watched(*args: Any, **named: Any) -> None:
            nonlocal weights_peak
            partition_(*args, **named)
            weights_peak = memory.bytes

        with PeakMemory(self._runtime.device) as memory, patch.object(engine, "partition_", watched):
            runner = build_runner(run, self._runtime, dtype=dtype)
            for share in runner.engine.shares():
                place = {"start": share.start, "stop": share.stop}
                share.master.copy_(draw(share.name, share.shape, seed=0, config=run.model, **place))
            runner.engine.refresh()
        sizes = [prod(shape) for shape in runner.engine.shapes.values()]
        element = dtype.itemsize
        return Built(sum(sizes), max(sizes) * element, element, weights_peak, memory.bytes, memory.reserved)


def plan_rows(config: ModelConfig, layout: Layout) -> Iterator[list[str]]:
    """One row for each pipeline rank, of which nothing is made but names and shapes."""
    alone = start_runtime(
        Environment("single", 0, 1, 0, "127.0.0.1", 0), Layout(dp=1), device=torch.device("cpu"), timeout_seconds=60,
        kv_heads=config.num_key_value_heads,
    )  # fmt: skip
    # Of the groups only their existence matters: nothing is sent while building.
    tp = TensorParallel(alone.groups.tp, rank=0, size=layout.tp, kv_group=alone.groups.kv)
    layers = stage_layers(config, stages=layout.pp, seq_len=config.max_position_embeddings)
    for pp_rank in range(layout.pp):
        began, before = time.perf_counter(), data_bytes()[0]
        stage = build_stage(config, layers=layers, pp=layout.pp, pp_rank=pp_rank, tp=tp)
        seconds, held = time.perf_counter() - began, data_bytes()[0] - before
        parameters = sum(p.numel() for p in stage.parameters())
        share, module = parameters * (2 + STATE) / layout.dp, 2 * largest_module(stage)
        yield [
            str(pp_rank),
            str(len(layers[pp_rank])),
            f"{parameters / 1e6:,.0f} M",
            f"{share / GIB:.2f}",
            f"{module / GIB:.2f}",
            f"{(share + module) / GIB:.2f}",
            f"{seconds:.2f}",
            f"{held / 2**20:.1f}",
        ]


def largest_module(stage: Stage) -> int:
    """Elements of the module that has most of its own."""
    return max(sum(p.numel() for p in _own(module)) for module in stage.modules())


def _own(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module._parameters.values() if parameter is not None]


def build_rows(spec: Spec) -> Iterator[list[str]]:
    """One row for each rank that was built."""
    with Ranks(spec.layout.world, Builder, spec) as ranks:
        answers = ranks.call("build")
    for rank, built in enumerate(answers):
        shares = [built.parameters * size / spec.layout.dp for size in (built.element, built.element + STATE)]
        cells = [f"{built.parameters / 1e6:,.1f} M", f"{built.module / GIB:.3f}"]
        for share, peak in zip(shares, (built.weights_peak, built.peak), strict=True):
            bound = share + built.module
            cells += [f"{share / GIB:.3f}", f"{peak / GIB:.3f} / {bound / GIB:.3f}", f"{peak / bound:.3f}"]
        yield [str(rank), str(spec.layout.coord(rank).pp), *cells, f"{built.reserved / GIB:.3f}"]


def fitting_layers(config: ModelConfig) -> int:
    """As many of the model's layers as two thirds of the free memory hold, at 20 bytes for each parameter."""
    free = 1024 * int(re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), flags=re.MULTILINE)[1])
    bare = num_parameters(config.model_copy(update={"num_hidden_layers": 0}))
    each = (num_parameters(config) - bare) // config.num_hidden_layers
    return min(config.num_hidden_layers, max(2, int((free * 2 / 3 / (4 + STATE) - bare) // each)))


def phase(name: str) -> tuple[str, str, str]:
    return (f"{name}: share", f"{name}: peak / bound", f"{name}: ratio")


def billions(config: ModelConfig) -> str:
    return f"{num_parameters(config) / 1e9:.3f} B parameters"


def print_table(head: list[str], rows: Iterator[list[str]]) -> None:
    print(f"| {' | '.join(head)} |\n| {' | '.join(['--:'] * len(head))} |")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)
    print()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planned", metavar="FILE", default=MODELS / "llama2-70b.yaml", type=Path)
    parser.add_argument("--plan", default="tp8,pp4,dp8", help="its layout")
    parser.add_argument("--built", metavar="FILE", default=MODELS / "tinyllama-1.1b.yaml", type=Path)
    parser.add_argument("--layout", default="pp2,dp2", help="its layout, built with ZeRO-3")
    parser.add_argument("--layers", type=int, help="how many layers of it; default: what fits")
    args = parser.parse_args()

    planned = load_model_config(args.planned)
    work = Work(planned.model_dump(), planned.max_position_embeddings, batch=1024, micro_batch=1)
    layout = read_spec(f"{args.plan},zero3", work).layout
    print(f"Planned: {args.planned.stem}, {billions(planned)}, {layout}, ZeRO-3, bf16; GiB, seconds, held MiB\n")
    print_table(
        ["pp rank", "layers", "parameters", "share", "module", "share + module", "seconds", "held"],
        plan_rows(planned, layout),
    )
    built = load_model_config(args.built)
    built = built.model_copy(update={"num_hidden_layers": args.layers or fitting_layers(built)})
    work = Work(built.model_dump(), min(built.max_position_embeddings, 2048), batch=8, micro_batch=1)
    spec = read_spec(f"{args.layout},zero3", work)
    where = f"{spec.layout}, ZeRO-3, on {device_for(spec.layout)}"
    print(f"Built: {args.built.stem} with {built.num_hidden_layers} layers, {billions(built)}, {where}; GiB\n")
    print_table(
        ["rank", "stage", "parameters", "module", *phase("weights"), *phase("all"), "reserved"],
        build_rows(spec),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
