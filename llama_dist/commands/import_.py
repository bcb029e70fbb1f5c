"""`llama-dist import`: weights from elsewhere, to begin a run from."""

from __future__ import annotations

import argparse
from pathlib import Path

from llama_dist.data.describe import format_bytes
from llama_dist.exchange.importing import MODEL, import_weights
from llama_dist.exchange.target import check_target
from llama_dist.exchange.weights import open_foreign
from llama_dist.model.cuts import num_parameters
from llama_dist.train.metrics import quantity

DESCRIPTION = """\
Write a folder that a run begins from, of a LLaMA of Hugging Face's (config.json and safetensors files) or of Meta's
(params.json and consolidated.*.pth): the weights in float32 as checkpoints/step-00000000, model.yaml, and the
tokenizer's files. A run whose `folder` it is begins at step 0 from these weights, under any layout."""
EPILOG = """\
Nothing is loaded that could run code, and never more than a part of a tensor is held in memory.

examples:
  llama-dist import SmolLM2-135M --to runs/smollm
  llama-dist import llama-2-7b --to runs/llama2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", metavar="FOLDER", help="the weights: a folder of Hugging Face's or of Meta's")
    parser.add_argument("--to", metavar="FOLDER", required=True, help="the folder to make")


def run(args: argparse.Namespace) -> int:
    check_target(args.to)
    weights = open_foreign(args.source)
    copied = import_weights(weights, args.to)
    to, model = Path(args.to), weights.model
    size = sum(path.stat().st_size for path in (to / "checkpoints").rglob("rank-*.bin"))
    print(f"{to}: {quantity(num_parameters(model))} parameters from {args.source} ({weights.dtype})")
    print(f"  checkpoints/step-00000000  {format_bytes(size)}, float32")
    print(f"  {MODEL:<25}  {model.num_hidden_layers} layers of {model.hidden_size}, vocabulary {model.vocab_size}")
    for name in copied:
        print(f"  {name}")
    names = [name for name in ("tokenizer.model", "tokenizer.json") if name in copied]
    tokenizer = str(to / names[0]) if names else "FILE"
    print("what next:")
    print(f'  llama-dist generate "Once upon a time" --checkpoint {to}' + ("" if names else " --tokenizer FILE"))
    print(f"  llama-dist train RUN.yaml folder={to} model={to / MODEL} data.tokenizer={tokenizer}")
    if not names:
        print(f"  {args.source} has neither tokenizer.model nor tokenizer.json: name the one that the model was trained with")
    return 0
