"""`llama-dist verify`: shards, a checkpoint, or all checkpoints of a run, held to all that they say of themselves."""

from __future__ import annotations

import argparse
from pathlib import Path

from llama_dist.checkpoint.places import Place
from llama_dist.checkpoint.store import open_place, read_checkpoint
from llama_dist.checkpoint.whole import checkpoints_at, is_checkpoint, problems_of
from llama_dist.data.describe import format_bytes
from llama_dist.data.packing import find_packing_damage
from llama_dist.data.verify import verify_shards
from llama_dist.errors import UserError

DESCRIPTION = """\
Read all of a shard directory, a Megatron .bin/.idx pair, a checkpoint or all checkpoints of a run, and say all that is
wrong."""
EPILOG = """\
The status is 0 where nothing is wrong, and otherwise 2. All may lie behind a URL.

examples:
  llama-dist verify runs/default/shards/train
  llama-dist verify megatron/corpus_text_document --tokenizer tokenizer.model
  llama-dist verify s3://bucket/shards
  llama-dist verify runs/default/checkpoints/step-00000300
  llama-dist verify runs/default --fast
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "path", metavar="PATH", help="a shard directory, the prefix of a .bin/.idx pair, a checkpoint, a run; or its URL"
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="hold the ids to its vocabulary, and the manifest to its fingerprint"
    )
    parser.add_argument("--fast", action="store_true", help="of checkpoints, only that all files are there in their sizes")
    parser.add_argument("--workers", metavar="N", type=int, help="files read at a time (default: one a core, up to 16)")


def run(args: argparse.Namespace) -> int:
    path = Path(args.path)
    if is_checkpoint(args.path) or path.parent.name == "checkpoints":
        where, _, name = args.path.rstrip("/").rpartition("/")
        return _verify_checkpoints(open_place(where or "."), [name], full=not args.fast)
    place, names = checkpoints_at(args.path)
    if names:
        return _verify_checkpoints(place, names, full=not args.fast)
    if args.fast:
        raise UserError(f"{args.path}: has no checkpoints, and --fast is of them only; leave it out")
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


def _verify_checkpoints(place: Place, names: list[str], *, full: bool) -> int:
    damaged: list[str] = []
    for name in names:
        where = f"{place.where}/{name}"
        problems = problems_of(place, name, full=full)
        if problems:
            damaged.append(name)
            print(f"{where}: damaged: {'; '.join(problems)}")
            continue
        files = read_checkpoint(place, name).manifest["files"].values()
        checked = "every checksum right" if full else "all of their sizes (checksums not looked at)"
        print(f"{where}: whole: {len(files)} file(s), {format_bytes(sum(f['bytes'] for f in files))}, {checked}")
    if damaged:
        raise UserError(f"{place.where}: {len(damaged)} of {len(names)} damaged: {', '.join(damaged)}")
    return 0
