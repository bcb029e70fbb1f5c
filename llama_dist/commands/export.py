"""`llama-dist export`: weights for Transformers or llama.cpp."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llama_dist.checkpoint.whole import check_tokenizer, config_of, is_imported
from llama_dist.data.describe import format_bytes
from llama_dist.errors import UserError
from llama_dist.exchange.exporting import DTYPES, export_weights
from llama_dist.exchange.gguf_files import export_gguf
from llama_dist.exchange.target import check_target
from llama_dist.exchange.tokenizer_files import TokenizerSource, open_tokenizer
from llama_dist.exchange.weights import CheckpointWeights, Weights, open_weights

GGUF = ".gguf"
DESCRIPTION = """\
Write the weights of a run's newest checkpoint, or of a checkpoint that any layout saved, as a folder that Transformers
loads without code of its own (safetensors, config.json, generation_config.json, tokenizer), or as a GGUF file for
llama.cpp. Never more than a part of a tensor is held in memory."""
EPILOG = """\
The export gives the same logits and the same ids as here. A text that spells a special token, such as "</s>", is plain
text here and a special token in Transformers (unless split_special_tokens is set there).

examples:
  llama-dist export runs/default --to exported
  llama-dist export runs/default/checkpoints/step-00000300 --to exported --dtype bf16 --max-shard-gb 2
  llama-dist export runs/default --to default.gguf --dtype fp16
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a run, a checkpoint (also behind a URL), or weights that import takes"
    )
    parser.add_argument("--to", metavar="PATH", required=True, help="the folder to make, or the .gguf file")
    parser.add_argument("--format", choices=("hf", "gguf"), help="default: gguf for a name in .gguf, hf otherwise")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="fp32", help="default: %(default)s, which is what checkpoints hold"
    )
    parser.add_argument(
        "--max-shard-gb", type=float, default=5.0, metavar="GB", help="size of a safetensors file (default: %(default)s)"
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="the tokenizer's file, where it has moved since training")
    parser.add_argument("--no-tokenizer", action="store_true", help="the weights and their configuration only")


def run(args: argparse.Namespace) -> int:
    is_gguf = args.format == "gguf" or (args.format is None and args.to.endswith(GGUF))
    if args.max_shard_gb <= 0:
        raise UserError(f"--max-shard-gb={args.max_shard_gb:g}: must be more than 0; 5 is usual")
    if is_gguf and not args.to.endswith(GGUF):
        raise UserError(f"--to={args.to}: a GGUF file is called something{GGUF}; name it so")
    if is_gguf and args.no_tokenizer:
        raise UserError("--no-tokenizer: a GGUF file holds its tokenizer; leave the option out, or export without gguf")
    if not is_gguf:
        check_target(args.to)
    weights, passed_over = open_weights(args.checkpoint)
    for problem in passed_over:
        print(f"checkpoint passed over: {problem}", file=sys.stderr)
    tokenizer = None if args.no_tokenizer else _tokenizer(weights, args.tokenizer)
    dtype, to = DTYPES[args.dtype], Path(args.to)
    if is_gguf:
        export_gguf(weights, to, dtype=dtype, tokenizer=tokenizer, name=to.stem)
        print(f"{to}: {weights.where} in {args.dtype}, {format_bytes(to.stat().st_size)}")
        return 0
    shard_bytes = max(1, round(args.max_shard_gb * 1e9))
    export_weights(weights, to, dtype=dtype, shard_bytes=shard_bytes, tokenizer=tokenizer)
    print(f"{to}: {weights.where} in {args.dtype}")
    for path in sorted(to.iterdir()):
        print(f"  {path.name:<36} {format_bytes(path.stat().st_size)}")
    return 0


def _tokenizer(weights: Weights, given: str | None) -> TokenizerSource:
    """The tokenizer that was given, or that of the run, or the one beside weights from elsewhere."""
    is_checkpoint = isinstance(weights, CheckpointWeights)
    try:
        where = config_of(weights.checkpoint).data.tokenizer if is_checkpoint else weights.where
        source = open_tokenizer(given or where)
    except UserError as error:
        raise UserError(f"{error} (name it with --tokenizer, or leave it out with --no-tokenizer)") from error
    if is_checkpoint and not is_imported(weights.checkpoint):
        check_tokenizer(weights.checkpoint, source.tokenizer)
    if source.tokenizer.vocab_size > weights.model.vocab_size:
        raise UserError(
            f"{source.path}: has {source.tokenizer.vocab_size} tokens and the model {weights.model.vocab_size}; it is that "
            "of another model: name the right one with --tokenizer"
        )
    return source
