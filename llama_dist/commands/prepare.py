"""`llama-dist prepare`: raw text -> token shards."""

from __future__ import annotations

import argparse
from pathlib import Path

from llama_dist.data.describe import describe_shards
from llama_dist.data.prepare import prepare

DESCRIPTION = """\
Turn text into token shards: the .bin/.idx pairs of Megatron-LM and a MANIFEST.json with checksums. Each document is
bos, its tokens, eos. The result is the same for any number of workers, and DIR appears only when it is complete."""
EPILOG = """\
example:
  llama-dist prepare data/python/train.jsonl --tokenizer data/python/tokenizer.model --out data/python/train
  llama-dist prepare books/ more.txt --tokenizer llama2/tokenizer.model --out shards/books --workers 16
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "inputs",
        metavar="INPUT",
        nargs="+",
        type=Path,
        help='a .txt file (one document), a .jsonl file ({"text": ...} on each line), or a folder of such files',
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        metavar="FILE",
        help="a sentencepiece .model or a Hugging Face tokenizer.json",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the shard directory to make")
    parser.add_argument("--workers", type=int, metavar="N", help="processes to tokenize with (default: one a core)")


def run(args: argparse.Namespace) -> int:
    prepared = prepare(args.inputs, args.tokenizer, args.out, workers=args.workers)
    if prepared.already_there:
        print("The shards of these inputs and this tokenizer are there already; nothing was done.")
    print(describe_shards(args.out))
    return 0
