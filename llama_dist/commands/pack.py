"""`llama-dist pack`: shards -> an index of best-fit packed samples beside them."""

from __future__ import annotations

import argparse
from pathlib import Path

from llama_dist.data.describe import format_bytes
from llama_dist.data.packing import Packing, index_folder, pack

DESCRIPTION = """\
Pack documents into samples best-fit, so that only those longer than a sample are cut (Ding et al. 2024), for training
with data.packing: best_fit. What is made is an index in the shard directory, of about 1% of its size; the shards stay
as they are. It is the same for any number of workers, and appears only when it is complete."""
EPILOG = """\
example:
  llama-dist pack runs/default/shards/train --seq-len 2048
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "shards", metavar="SHARDS", help="a shard directory, or a Megatron pair by its prefix"
    )
    parser.add_argument("--seq-len", type=int, required=True, metavar="N", help="data.seq_len of the run")
    parser.add_argument("--workers", type=int, metavar="N", help="pairs to pack at a time (default: one a core)")


def run(args: argparse.Namespace) -> int:
    packing, already_there = pack(args.shards, seq_len=args.seq_len, workers=args.workers)
    if already_there:
        print("The index of these shards is there already; nothing was done.")
    print(describe_packing(packing, index_folder(args.shards, args.seq_len)))
    return 0


def describe_packing(packing: Packing, folder: Path) -> str:
    """How good a packing is, beside concatenating and cutting."""
    tokens, documents, samples = (packing.total(what) for what in ("tokens", "documents", "samples"))
    concatenated = max(tokens - 1, 0) // packing.seq_len
    cut, cut_by_concat, short = (packing.total(what) for what in ("cut", "cut_by_concat", "short"))
    lines = [
        f"{folder}: {tokens:,} tokens in {documents:,} documents",
        f"  samples           {samples:,} of {packing.seq_len + 1:,} tokens (concatenated: {concatenated:,})",
        f"  padding           {packing.padding_share:.4%}",
        f"  documents cut     {cut:,} ({cut / documents:.2%}), each longer than a sample "
        f"(concatenated: {cut_by_concat:,}, {cut_by_concat / documents:.2%})",
        f"  index             {format_bytes(packing.total('bytes'))}",
    ]
    if short:
        lines.append(f"  left out          {short:,} documents of one token or none, with nothing to predict")
    return "\n".join(lines)
