"""What a training step costs beside a plain PyTorch loop: the same model, data and optimizer in one process.

    python benchmarks/step.py [--steps 10] [--hidden 192] ...

The two take turns, step by step, so that a machine that slows down slows both. Prints the median time of each and
their ratio for ZeRO 1, 2 and 3, and the share of the machine's own matrix-product rate that the engine reaches.
One rank: the cost of DeepSpeed's bookkeeping, without communication.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from llama_dist.config import RunConfig, build_config
from llama_dist.data.loader import Batch
from llama_dist.layout import Layout
from llama_dist.model.cuts import flops_per_token, num_parameters
from llama_dist.model.init import init_
from llama_dist.model.llama import Llama
from llama_dist.pipeline.runner import build_runner
from llama_dist.pipeline.stage import checkpoint_
from llama_dist.runtime import Runtime, read_environment, start_runtime, stop_runtime
from llama_dist.train.metrics import peak_tflops

PLAIN_LINEAR = F.linear  # ZeRO-3 puts its own in its place, for the whole process


def build_run(args: argparse.Namespace, *, zero: int) -> RunConfig:
    model = {
        "vocab_size": args.vocab, "hidden_size": args.hidden, "intermediate_size": args.hidden * 8 // 3 // 8 * 8,
        "num_hidden_layers": args.layers, "num_attention_heads": 6, "num_key_value_heads": 2,
        "max_position_embeddings": args.seq_len,
    }  # fmt: skip
    values = {
        "name": "benchmark",
        "model": model,
        "parallel": {"zero": zero, "micro_batch": args.batch, "activation_checkpointing": args.recompute},
        "data": {"tokenizer": "-", "train": [{"shards": "-"}], "seq_len": args.seq_len},
        "optim": {"lr": 1e-3},
        "train": {"steps": 1, "global_batch": args.batch, "device": "cpu"},
    }
    return build_config(RunConfig, values, where="benchmarks/step.py")


def plain_step(run: RunConfig) -> Callable[[torch.Tensor], None]:
    """A step of the loop that one would write without this project."""
    model = Llama(run.model)
    init_(model, run.model, 0)
    checkpoint_(model, run.parallel.activation_checkpointing)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.optim.lr, fused=True)

    def step(batch: torch.Tensor) -> None:
        logits = model(batch[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def engine_step(run: RunConfig, runtime: Runtime) -> Callable[[torch.Tensor], None]:
    runner = build_runner(run, runtime, dtype=torch.float32)
    for share in runner.engine.shares():
        share.master.normal_(std=run.model.initializer_range)
    runner.engine.refresh()

    def step(batch: torch.Tensor) -> None:
        runner.train_step([Batch(batch)])
        runner.engine.apply_gradients(run.optim.lr)

    return step


def seconds_of(step: Callable[[torch.Tensor], None], batch: torch.Tensor) -> float:
    started_at = time.perf_counter()
    step(batch)
    return time.perf_counter() - started_at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = (("steps", 10), ("batch", 4), ("seq-len", 256), ("hidden", 192), ("layers", 4), ("vocab", 4096))
    for name, default in sizes:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--recompute", default="none", choices=["none", "full", "selective"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    runtime = start_runtime(
        read_environment({}), Layout(dp=1), device=torch.device("cpu"), timeout_seconds=60, kv_heads=2
    )
    peak = peak_tflops(runtime.device, torch.float32, configured=None)
    for zero in (1, 2, 3):
        run = build_run(args, zero=zero)
        plain, ours = plain_step(run), engine_step(run, runtime)
        zero_linear = F.linear
        times: dict[str, list[float]] = {"plain": [], "ours": []}
        for i in range(args.steps + 2):
            batch = torch.randint(0, args.vocab, (args.batch, args.seq_len + 1))
            F.linear = PLAIN_LINEAR
            a = seconds_of(plain, batch)
            F.linear = zero_linear
            b = seconds_of(ours, batch)
            if i >= 2:  # the first two warm up
                times["plain"].append(a)
                times["ours"].append(b)
        plain_seconds, our_seconds = (statistics.median(times[name]) for name in ("plain", "ours"))
        rate = args.batch * args.seq_len / our_seconds
        share = rate * flops_per_token(run.model, args.seq_len) / (peak * 1e12)
        print(
            f"ZeRO-{zero}: plain {plain_seconds:.3f} s, ours {our_seconds:.3f} s, ours / plain "
            f"{our_seconds / plain_seconds:.3f}; {rate:,.0f} tokens/s, {share:.0%} of {1000 * peak:.0f} GFLOP/s "
            f"({num_parameters(run.model) / 1e6:.1f}M parameters)"
        )
    stop_runtime()


if __name__ == "__main__":
    main()
