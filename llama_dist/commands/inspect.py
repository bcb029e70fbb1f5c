"""`llama-dist inspect`: what a run, a checkpoint or a shard directory holds."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_dist.checkpoint.places import MANIFEST, Place
from llama_dist.checkpoint.plan import ITEM
from llama_dist.checkpoint.store import Checkpoint, read_checkpoint
from llama_dist.checkpoint.whole import checkpoints_at, config_of, is_checkpoint, is_imported, problems_of, read_whole
from llama_dist.data.describe import describe_shards, format_bytes
from llama_dist.data.remote import is_url
from llama_dist.errors import UserError
from llama_dist.exchange.meta import PARAMS, MetaWeights
from llama_dist.exchange.weights import open_foreign
from llama_dist.files import read_json_lines
from llama_dist.model.cuts import num_parameters
from llama_dist.model.hf import HuggingFaceWeights
from llama_dist.train.ledger import LEDGER
from llama_dist.train.metrics import METRICS, quantity, read_metrics
from llama_dist.train.resume import flat

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
        "path",
        metavar="PATH",
        help="a run folder, a checkpoint, weights that import takes, or shards (a folder, a Megatron pair); or its URL",
    )
    parser.add_argument("--fast", action="store_true", help="of checkpoints, look at sizes and not at checksums")
    parser.add_argument("--tensors", action="store_true", help="of a checkpoint, list every tensor of every layer")
    parser.add_argument("--tokenizer", metavar="FILE", help="decode the samples with it, not with what made the shards")


def run(args: argparse.Namespace) -> int:
    path = Path(args.path)
    if is_checkpoint(args.path) or path.parent.name == "checkpoints":
        print(describe_checkpoint(args.path, fast=args.fast, every=args.tensors))
        return 0
    if Path(f"{path}.idx").is_file():
        print(describe_shards(args.path, args.tokenizer))
        return 0
    if is_url(args.path):
        place, names = checkpoints_at(args.path)
        lines = [f"  checkpoint {_state_of(place, name, fast=args.fast)}" for name in names]
        print("\n".join([f"{args.path}:", *lines]) if names else describe_shards(args.path, args.tokenizer))
        return 0
    if not path.is_dir():
        raise UserError(f"{path}: there is no such folder; name a run folder, a checkpoint or a shard directory")
    if (path / LEDGER).is_file() or (path / "checkpoints").is_dir():
        print(describe_run(path, fast=args.fast))
    elif (path / "config.json").is_file() or (path / PARAMS).is_file():
        print(describe_weights(open_foreign(path), every=args.tensors))
    elif (path / MANIFEST).is_file():
        print(describe_shards(path, args.tokenizer))
    else:
        raise UserError(
            f"{path}: is neither a run folder ({LEDGER}), a checkpoint, shards ({MANIFEST}), nor weights (config.json)"
        )
    return 0


def describe_checkpoint(path: str | Path, *, fast: bool = False, every: bool = False) -> str:
    """Layout, position, tensors, sizes, settings and versions of a checkpoint; UserError where it does not verify."""
    checkpoint = read_whole(path, full=not fast)
    manifest, saved = checkpoint.manifest, checkpoint.saved
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    files = [file["bytes"] for file in manifest["files"].values()]
    lines = [f"checkpoint {path}: whole, {'every size' if fast else 'every checksum'} right"]
    if is_imported(checkpoint):
        origin = manifest["imported"]
        size = format_bytes(sum(origin["files"].values()))
        lines.append(f"  weights imported from {origin['from']} ({size}, {origin['dtype']}) by {versions}")
    else:
        layout = f"{str(saved.layout).replace('=', ' ')} zero {saved.zero}"
        lines += [
            f"  step {checkpoint.position.step}, {checkpoint.position.samples} samples, {_tokens(checkpoint)} tokens",
            f"  saved under {layout} by {versions}",
            f"  tokenizer sha256 {manifest.get('tokenizer', 'not said')[:12]}",
        ]
    parameters = num_parameters(saved.model)
    tensors = len(saved.states) * len(saved.shapes)
    lines.append(
        f"  {tensors} logical tensors ({len(saved.shapes)} weights, float32) in {len(files)} files, {format_bytes(sum(files))}"
    )
    lines += [f"    {state or 'weights':<12} {format_bytes(ITEM * parameters)}" for state in saved.states]
    lines.append(f"  {quantity(parameters)} parameters:")
    lines += _shapes(saved.shapes, every=every)
    if not is_imported(checkpoint):
        values = config_of(checkpoint).model_dump(mode="json", exclude_defaults=True)
        lines.append("  settings that are not the defaults:")
        lines += [f"    {name} = {value}" for name, value in flat(values) if not name.startswith("model.")]
    return "\n".join(lines)


def describe_weights(weights: HuggingFaceWeights | MetaWeights, *, every: bool = False) -> str:
    """Model, types, sizes and tensors of weights from elsewhere."""
    size = format_bytes(sum(path.stat().st_size for path in weights.files))
    lines = [
        f"weights {weights.where}: {quantity(num_parameters(weights.model))} parameters, {weights.dtype}, in "
        f"{len(weights.files)} file(s), {size}",
        *(f"  {name} = {value}" for name, value in flat(weights.model.model_dump(mode="json"))),
    ]
    return "\n".join(lines + _shapes(weights.tensors(), every=every))


def _shapes(shapes: Mapping[str, tuple[int, ...]], *, every: bool) -> list[str]:
    """A line a tensor, those of all layers in one unless `every` is asked for: no layer has other shapes."""
    if every:
        return [f"    {name:<52} {shape}" for name, shape in shapes.items()]
    layers = len({name.split(".")[2] for name in shapes if name.startswith("model.layers.")})
    merged = {re.sub(r"^model\.layers\.\d+\.", f"model.layers.0..{layers - 1}.", n): s for n, s in shapes.items()}
    return [f"    {name:<52} {shape}" for name, shape in merged.items()]


def _tokens(checkpoint: Checkpoint) -> str:
    return quantity(checkpoint.position.samples * checkpoint.manifest["config"]["data"]["seq_len"])


def describe_run(path: Path, *, fast: bool = False) -> str:
    """Where a run stands: its last step, starts, checkpoints and evaluations."""
    events = read_json_lines(path / LEDGER) if (path / LEDGER).is_file() else []
    steps = read_metrics(path / METRICS) if (path / METRICS).is_file() else []
    starts = [event for event in events if event["event"] == "start"]
    lines = [f"run {path}: {len(starts)} start(s), last event: {events[-1]['event'] if events else 'none'}"]
    if steps:
        last = steps[-1]
        lines.append(f"  step {last['step']}: loss {last['loss']:.4f}, {quantity(last['tokens_per_second'])} tok/s")
    place, names = checkpoints_at(path)
    lines += [f"  checkpoint {_state_of(place, name, fast=fast)}" for name in names]
    lines += [f"  {_evaluation(event)}" for event in events if event["event"] == "eval"]
    return "\n".join(lines)


def _state_of(place: Place, name: str, *, fast: bool) -> str:
    problems = problems_of(place, name, full=not fast)
    if problems:
        return f"{name}: is damaged: {'; '.join(problems)}"
    imported = read_checkpoint(place, name).manifest.get("imported")
    return f"{name}: whole" + (f", imported from {imported['from']}" if imported else "")


def _evaluation(event: dict[str, Any]) -> str:
    measures = ("loss", "perplexity", "accuracy", "accuracy_norm", "accuracy_mutual_info", "chance")
    figures = ", ".join(f"{name} {event[name]:.3f}" for name in measures if name in event)
    return f"eval at step {event['step']}: {event['task']}: {figures}"
