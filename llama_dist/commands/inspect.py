"""`llama-dist inspect`: what a run, a checkpoint or a shard directory holds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from llama_dist.checkpoint.places import MANIFEST
from llama_dist.checkpoint.store import Checkpoint, open_place
from llama_dist.checkpoint.whole import is_checkpoint, read_whole
from llama_dist.data.describe import describe_shards, format_bytes
from llama_dist.data.remote import is_url
from llama_dist.errors import UserError
from llama_dist.files import read_json_lines
from llama_dist.train.ledger import LEDGER
from llama_dist.train.metrics import METRICS, quantity, read_metrics

DESCRIPTION = "Say what a run folder, a checkpoint or a shard directory holds, and whether it is whole."
EPILOG = """\
examples:
  llama-dist inspect runs/default
  llama-dist inspect runs/default/checkpoints/step-00000300
  llama-dist inspect runs/default/shards/train
  llama-dist inspect s3://bucket/shards --tokenizer tokenizer.model
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "path", metavar="PATH", help="a run folder, a checkpoint, or shards: a folder, a Megatron pair or a URL"
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="decode the samples with it, not with what made the shards")


def run(args: argparse.Namespace) -> int:
    path = Path(args.path)
    if is_checkpoint(args.path) or path.parent.name == "checkpoints":
        print(describe_checkpoint(args.path))
        return 0
    if is_url(args.path) or Path(f"{path}.idx").is_file():
        print(describe_shards(args.path, args.tokenizer))
        return 0
    if not path.is_dir():
        raise UserError(f"{path}: there is no such folder; name a run folder, a checkpoint or a shard directory")
    if (path / LEDGER).is_file():
        print(describe_run(path))
    elif (path / MANIFEST).is_file():
        print(describe_shards(path, args.tokenizer))
    else:
        raise UserError(f"{path}: is neither a run folder ({LEDGER}), a checkpoint nor shards ({MANIFEST})")
    return 0


def describe_checkpoint(path: str | Path) -> str:
    """Layout, position, tensors, sizes and versions of a checkpoint; UserError where it does not verify."""
    checkpoint = read_whole(path)
    manifest = checkpoint.manifest
    saved = checkpoint.saved
    layout = f"{str(saved.layout).replace('=', ' ')} zero {saved.zero}"
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    tensors = dict(saved.tensors())
    lines = [
        f"checkpoint {path}: whole, every checksum right",
        f"  step {checkpoint.position.step}, {checkpoint.position.samples} samples, {_tokens(checkpoint)} tokens",
        f"  saved under {layout} by {versions}",
        f"  {len(tensors)} logical tensors ({len(saved.shapes)} weights, float32) in {len(manifest['files'])} files, "
        f"{format_bytes(sum(file['bytes'] for file in manifest['files'].values()))}",
    ]
    return "\n".join(lines + [f"    {name:<52} {shape}" for name, shape in saved.shapes.items()])


def _tokens(checkpoint: Checkpoint) -> str:
    return quantity(checkpoint.position.samples * checkpoint.manifest["config"]["data"]["seq_len"])


def describe_run(path: Path) -> str:
    """Where a run stands: its last step, starts, checkpoints and evaluations."""
    events = read_json_lines(path / LEDGER)
    steps = read_metrics(path / METRICS) if (path / METRICS).is_file() else []
    starts = [event for event in events if event["event"] == "start"]
    lines = [f"run {path}: {len(starts)} start(s), last event: {events[-1]['event'] if events else 'none'}"]
    if steps:
        last = steps[-1]
        lines.append(f"  step {last['step']}: loss {last['loss']:.4f}, {quantity(last['tokens_per_second'])} tok/s")
    lines += [f"  checkpoint {_state_of(folder)}" for folder in _checkpoints(path)]
    lines += [f"  {_evaluation(event)}" for event in events if event["event"] == "eval"]
    return "\n".join(lines)


def _checkpoints(run: Path) -> list[str]:
    place = open_place(run / "checkpoints")
    return [f"{place.where}/{name}" for name in place.names()]


def _state_of(where: str) -> str:
    try:
        read_whole(where)
    except UserError as error:
        return str(error)
    name = where.rpartition("/")[2]
    return f"{name}: whole"


def _evaluation(event: dict[str, Any]) -> str:
    measures = ("loss", "perplexity", "accuracy", "accuracy_norm", "accuracy_mutual_info", "chance")
    figures = ", ".join(f"{name} {event[name]:.3f}" for name in measures if name in event)
    return f"eval at step {event['step']}: {event['task']}: {figures}"
