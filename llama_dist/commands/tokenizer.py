"""`llama-dist tokenizer train`: a sentencepiece vocabulary from raw text."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from llama_dist.data.describe import format_bytes
from llama_dist.data.documents import read_part, with_line
from llama_dist.data.inputs import Part, list_inputs
from llama_dist.data.prepare import MAX_SKIPPED
from llama_dist.data.rows import Document, Reading
from llama_dist.data.skips import SkipLimit
from llama_dist.data.tokenizer import load_tokenizer
from llama_dist.data.vocabulary import CHARACTER_COVERAGE, SAMPLE_BYTES, train_tokenizer
from llama_dist.data.words import counted
from llama_dist.errors import UserError

TRAIN_DESCRIPTION = """\
Train a byte-pair vocabulary (sentencepiece, with the settings of LLaMA-2: byte fallback, split digits, unk 0, bos 1,
eos 2) on the inputs that `llama-dist prepare` takes. The same text gives the same file. All of the text is read, and
lines drawn evenly from all of it are trained on."""
TRAIN_EPILOG = """\
example:
  llama-dist tokenizer train data/python/train.jsonl --vocab-size 4096 --out data/python/tokenizer.model
  llama-dist tokenizer train books/ "web/*.parquet" --vocab-size 32000 --sample-mb 200 --out books.model
"""
TOLD = 3


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
    train.add_argument("inputs", metavar="INPUT", nargs="+", help="a file, folder, glob or URL: as for prepare")
    train.add_argument("--vocab-size", type=int, required=True, metavar="N", help="the number of pieces, all included")
    train.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write, such as my.model")
    train.add_argument("--text-column", default="text", metavar="NAME", help="as for prepare (default: text)")
    train.add_argument("--template", metavar="TEXT", help="as for prepare")
    train.add_argument(
        "--max-skipped",
        default=MAX_SKIPPED,
        metavar="N|P%",
        help=f"as for prepare (default: {MAX_SKIPPED.replace('%', '%%')} of the documents)",
    )
    train.add_argument(
        "--sample-mb",
        type=float,
        default=SAMPLE_BYTES / (1 << 20),
        metavar="MB",
        help="how much of the text to train on (default: %(default)g); training takes about ten times as much memory",
    )
    train.add_argument(
        "--character-coverage",
        type=float,
        default=CHARACTER_COVERAGE,
        metavar="SHARE",
        help="of the text; the rarest characters beyond it are spelled in bytes (default: %(default)g)",
    )


def run(args: argparse.Namespace) -> int:
    reading = Reading(text=args.text_column, template=args.template)
    written = train_tokenizer(
        _texts(args.inputs, reading, SkipLimit(args.max_skipped)),
        vocab_size=args.vocab_size,
        out=args.out,
        sample_bytes=int(args.sample_mb * (1 << 20)),
        character_coverage=args.character_coverage,
    )
    tokenizer = load_tokenizer(args.out)
    size = format_bytes(args.out.stat().st_size)
    print(f"{args.out}: {'made' if written else 'is there already'}, {tokenizer.vocab_size:,} pieces, {size}")
    print(f"  bos {tokenizer.bos_id}, eos {tokenizer.eos_id}, sha256 {tokenizer.fingerprint[:12]}")
    return 0


def _texts(inputs: Sequence[str], reading: Reading, limit: SkipLimit) -> Iterator[str]:
    """The texts of all documents; what cannot be read is counted, told at the end, and too much of it is an error."""
    documents = 0
    kinds: Counter[str] = Counter()
    first: list[str] = []
    files = list_inputs(inputs)
    for item in files:
        for document in read_part(Part(item.path), reading):
            if isinstance(document, Document):
                documents += 1
                yield document.text
            elif document.kind != "empty":
                kinds[document.kind] += document.count
                if len(first) < TOLD:
                    first.append(f"{with_line(document.where)}: {document.reason}")
    if skipped := kinds.total():
        counts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
        all_of_them = counted(documents + skipped, "document")
        told = f"{skipped:,} of {all_of_them} cannot be read ({counts}): {'; '.join(first)}"
        if not limit.allows(skipped, documents + skipped):
            raise UserError(f"{told}; allowed are {limit.text}: mend them, or raise --max-skipped")
        print(told, file=sys.stderr)
    if not documents:
        names = ", ".join(item.path for item in files[:TOLD]) + (", ..." if len(files) > TOLD else "")
        raise UserError(f"{names}: no documents with text; give at least one file that has some")
