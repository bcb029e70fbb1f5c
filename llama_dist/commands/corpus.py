"""`llama-dist corpus`: gather real text from this machine's Python."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from llama_dist.data.corpus import HELDOUT_FRACTION, MAX_BYTES, gather_corpus
from llama_dist.data.describe import format_bytes
from llama_dist.data.words import counted

DESCRIPTION = """\
Gather a corpus that every machine with Python has: the language reference, docstrings and sources of its standard
library. Writes train.jsonl, heldout.jsonl (documents of other modules and topics than train), choices.jsonl (a
multiple-choice benchmark made from the held-out text) and MANIFEST.json into the new folder OUT."""
EPILOG = """\
example:
  llama-dist corpus data/python
  llama-dist corpus data/small --max-mb 1
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to make")
    parser.add_argument(
        "--max-mb",
        type=float,
        default=MAX_BYTES / 1e6,
        metavar="N",
        help="at most so many megabytes of text (default: %(default)g)",
    )
    parser.add_argument(
        "--heldout-fraction",
        type=float,
        default=HELDOUT_FRACTION,
        metavar="X",
        help="the part of the text to hold out (default: %(default)g)",
    )


def run(args: argparse.Namespace) -> int:
    corpus = gather_corpus(args.out, max_bytes=round(args.max_mb * 1e6), heldout_fraction=args.heldout_fraction)
    manifest = corpus.manifest
    state = "is there already" if corpus.already_there else "made"
    print(f"{args.out}: {state}, from the standard library of {manifest['python']}")
    print(f"  train.jsonl    {_counts(manifest['train'])}")
    print(f"  heldout.jsonl  {_counts(manifest['heldout'])}")
    print(f"  choices.jsonl  {counted(manifest['choices'], 'question')} of four choices")
    return 0


def _counts(side: dict[str, dict[str, Any]]) -> str:
    documents = sum(kind["documents"] for kind in side.values())
    size = format_bytes(sum(kind["bytes"] for kind in side.values()))
    kinds = ", ".join(f"{kind} {counts['documents']}" for kind, counts in side.items())
    return f"{counted(documents, 'document')}, {size} ({kinds})"
