"""`llama-dist tokenizer train`: a sentencepiece vocabulary from raw text."""

from __future__ import annotations

import argparse
from pathlib import Path

from llama_dist.data.describe import format_bytes
from llama_dist.data.documents import read_documents
from llama_dist.data.tokenizer import load_tokenizer
from llama_dist.data.vocabulary import train_tokenizer

TRAIN_DESCRIPTION = """\
Train a byte-pair vocabulary (sentencepiece, with the settings of LLaMA-2: byte fallback, split digits, unk 0, bos 1,
eos 2) on .txt and .jsonl files. The same text gives the same file."""
TRAIN_EPILOG = """\
example:
  llama-dist tokenizer train data/python/train.jsonl --vocab-size 4096 --out data/python/tokenizer.model
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Make a tokenizer."
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    train = actions.add_parser(
        "train",
        help="train a sentencepiece vocabulary on text",
        description=TRAIN_DESCRIPTION,
        epilog=TRAIN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument(
        "inputs",
        metavar="INPUT",
        nargs="+",
        type=Path,
        help='a .txt file (one document), a .jsonl file ({"text": ...} on each line), or a folder of such files',
    )
    train.add_argument("--vocab-size", type=int, required=True, metavar="N", help="the number of pieces, all included")
    train.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write, such as my.model")


def run(args: argparse.Namespace) -> int:
    texts = (document.text for document in read_documents(args.inputs))
    written = train_tokenizer(texts, vocab_size=args.vocab_size, out=args.out)
    tokenizer = load_tokenizer(args.out)
    size = format_bytes(args.out.stat().st_size)
    print(f"{args.out}: {'made' if written else 'is there already'}, {tokenizer.vocab_size:,} pieces, {size}")
    print(f"  bos {tokenizer.bos_id}, eos {tokenizer.eos_id}, sha256 {tokenizer.fingerprint[:12]}")
    return 0
