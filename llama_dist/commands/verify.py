"""`llama-dist verify`: shards, or a checkpoint, held to all that they say of themselves."""

from __future__ import annotations

import argparse
from pathlib import Path

from llama_dist.checkpoint.whole import is_checkpoint, read_whole
from llama_dist.data.describe import format_bytes
from llama_dist.data.packing import find_packing_damage
from llama_dist.data.verify import verify_shards
from llama_dist.errors import UserError

DESCRIPTION = "Read all of a shard directory, a Megatron .bin/.idx pair or a checkpoint, and say all that is wrong."
EPILOG = """\
The status is 0 where nothing is wrong, and otherwise 2. Shards may lie behind a URL.

examples:
  llama-dist verify runs/default/shards/train
  llama-dist verify megatron/corpus_text_document --tokenizer tokenizer.model
  llama-dist verify s3://bucket/shards
  llama-dist verify runs/default/checkpoints/step-00000300
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "path", metavar="PATH", help="a shard directory, the prefix of a .bin/.idx pair, a URL of either, or a checkpoint"
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="hold the ids to its vocabulary, and the manifest to its fingerprint"
    )
    parser.add_argument("--workers", metavar="N", type=int, help="files read at a time (default: one a core, up to 16)")


def run(args: argparse.Namespace) -> int:
    path = Path(args.path)
    if is_checkpoint(args.path) or path.parent.name == "checkpoints":
        manifest = read_whole(args.path).manifest
        size = sum(file["bytes"] for file in manifest["files"].values())
        print(f"{path}: whole: {len(manifest['files'])} files, {format_bytes(size)}, every checksum right")
        return 0
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers={args.workers}: must be at least 1")
    verified = verify_shards(args.path, tokenizer=args.tokenizer, workers=args.workers)
    checks, problems = list(verified.checks), list(verified.problems)
    for folder in sorted(path.glob("packed-*")):
        seq_len = folder.name.removeprefix("packed-")
        if seq_len.isdigit():
            problems += find_packing_damage(path, int(seq_len))
            checks.append(f"{folder.name}: sizes and checksums of the packed samples")
    for check in checks:
        print(f"{args.path}: {check}")
    if problems:
        listed = "\n  ".join(problems)
        raise UserError(f"{args.path}: {len(problems)} problem(s); copy or make the shards again\n  {listed}")
    print(f"{args.path}: nothing is wrong")
    return 0
