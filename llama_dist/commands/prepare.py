"""`llama-dist prepare`: raw text -> token shards."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llama_dist.data.describe import describe_shards
from llama_dist.data.inputs import passed_over
from llama_dist.data.prepare import MAX_SKIPPED, Node, prepare
from llama_dist.data.rows import MAX_DOCUMENT_BYTES, Reading
from llama_dist.errors import UserError

DESCRIPTION = """\
Turn text into token shards: the .bin/.idx pairs of Megatron-LM and a MANIFEST.json with checksums. Each document is
bos, its tokens, eos. The result is the same for any number of workers and nodes, and DIR appears only when it is
complete: until then the work is in DIR.partial, and the same command goes on with it, after a kill too.

INPUT is a file, a folder (all files in it that can be read), a glob, a URL of these or datasets:PATH, in the forms
txt, jsonl, json, csv, tsv (also .gz, .zst, .bz2, .xz), parquet and arrow. Large inputs should be many files, or plain
ones: a compressed file is read from its beginning, by one worker.

Several nodes may work on one DIR: start the same command on each, as `srun` and `mpirun` do. Under those a node knows
its number; elsewhere --node-rank and --num-nodes tell it where to begin. None leaves before DIR is complete, and what
was begun by a node that died is done by the others."""
EPILOG = """\
example:
  llama-dist prepare data/python/train.jsonl --tokenizer data/python/tokenizer.model --out data/python/train
  llama-dist prepare books/ more.txt --tokenizer llama2/tokenizer.model --out shards/books --workers 16
  llama-dist prepare news/*.parquet --text-column body --max-skipped 1% --tokenizer llama3 --out shards/news
"""
TERMINAL_SECONDS, LOG_SECONDS = 5.0, 30.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help="what to read: see above")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        metavar="FILE",
        help="a sentencepiece .model, a Hugging Face tokenizer.json or a tiktoken tokenizer.model",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the shard directory to make")
    reading = parser.add_argument_group("reading")
    usual = Reading()
    reading.add_argument(
        "--text-column", default=usual.text, metavar="NAME", help=f"key or column of the text (default: {usual.text})"
    )
    reading.add_argument("--template", metavar="TEXT", help='text of several columns, such as "{question} {answer}"')
    reading.add_argument(
        "--id-column", metavar="NAME", help='the column of the documents\' ids, for messages (default: "id", if there)'
    )
    reading.add_argument(
        "--txt",
        choices=("file", "line", "paragraph"),
        default=usual.txt,
        help=f"what a document of a .txt file is (default: {usual.txt})",
    )
    reading.add_argument(
        "--max-document-mb",
        type=float,
        default=MAX_DOCUMENT_BYTES / (1 << 20),
        metavar="MB",
        help="a longer document is skipped; one is held in memory, several times (default: %(default)g)",
    )
    reading.add_argument(
        "--max-skipped",
        default=MAX_SKIPPED,
        metavar="N|P%",
        help="stop where more documents than this cannot be read; those that are skipped are counted in MANIFEST.json "
        f"and listed in skipped.jsonl (default: {MAX_SKIPPED.replace('%', '%%')} of them)",
    )
    work = parser.add_argument_group("work")
    work.add_argument("--workers", type=int, metavar="N", help="processes to tokenize with (default: one a core)")
    work.add_argument("--node-rank", type=int, metavar="N", help="the number of this node, from 0")
    work.add_argument("--num-nodes", type=int, metavar="N", help="how many nodes work on this")


def run(args: argparse.Namespace) -> int:
    reading = Reading(
        text=args.text_column,
        template=args.template,
        id=args.id_column,
        txt=args.txt,
        max_document_bytes=int(args.max_document_mb * (1 << 20)),
    )
    if (args.node_rank is None) != (args.num_nodes is None):
        raise UserError("prepare: --node-rank and --num-nodes belong together; give both or neither")
    prepared = prepare(
        args.inputs,
        args.tokenizer,
        args.out,
        reading=reading,
        max_skipped=args.max_skipped,
        workers=args.workers,
        node=None if args.num_nodes is None else Node(args.node_rank, args.num_nodes),
        say=lambda line: print(f"prepare: {line}", file=sys.stderr, flush=True),
        say_every=TERMINAL_SECONDS if sys.stderr.isatty() else LOG_SECONDS,
    )
    if prepared.already_there:
        print("The shards of these inputs and this tokenizer are there already; nothing was done.")
    if skipped := prepared.manifest.skipped:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in skipped.items())
        listed = f"; see {args.out / 'skipped.jsonl'}" if "skipped.jsonl" in prepared.manifest.files else ""
        print(f"Skipped documents: {kinds}{listed}.", file=sys.stderr)
    if others := passed_over(args.inputs):
        names = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        print(f"Files in these folders of no kind that is read here: {len(others):,} ({names}).", file=sys.stderr)
    print(describe_shards(args.out))
    return 0
