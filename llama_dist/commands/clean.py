"""`llama-dist clean`: text -> text without what a run should not learn from."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

from llama_dist.data.clean.choices import DEDUPS, Choices
from llama_dist.data.clean.filters import FILTERS, chosen_filters, settings_of
from llama_dist.data.clean.jsonl import SUFFIXES
from llama_dist.data.clean.run import clean
from llama_dist.data.documents import Reading

DESCRIPTION = f"""\
Clean text before `llama-dist prepare`: quality filters ({", ".join(FILTERS)}), what also
stands in held-out texts, exact and near duplicates. The steps are done in this order, each only if it is asked for.
FOLDER/text has what stays, in the order of the inputs; FOLDER/removed.jsonl.zst lists what was taken out and why, and
FOLDER/report.json counts it. The result is the same for any number of workers, and FOLDER appears only when it is
complete. The filters need `pip install 'llama_dist[clean]'`."""
EPILOG = """\
example:
  llama-dist clean web/*.jsonl.gz --out clean/web --filters gopher_quality,gopher_repetition --dedup exact,near
  llama-dist clean web/ --out clean/web --filters c4 --set c4.min_num_sentences=3 --against test.jsonl
  llama-dist clean train.jsonl --report-only --against heldout.jsonl
  llama-dist prepare clean/web/text --tokenizer llama2/tokenizer.model --out shards/web
"""
TELL_SECONDS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("inputs", metavar="INPUT", nargs="*", help="a file, a folder, a glob or a URL, as for `llama-dist prepare`")
    add("--out", type=Path, metavar="FOLDER", help="the folder to make")
    add("--filters", default="", metavar="NAMES", help=f"quality filters, with commas between: {', '.join(FILTERS)}")
    add(
        "--set",
        action="append",
        default=[],
        metavar="FILTER.SETTING=VALUE",
        help="another threshold than the published one, or null for none; may be repeated",
    )
    add("--list-filters", action="store_true", help="print the settings of all filters, and do nothing")
    add("--dedup", default="", metavar="KINDS", help=f"duplicates to take out, with commas: {','.join(DEDUPS)}")
    add(
        "--similarity",
        type=float,
        default=Choices.similarity,
        metavar="SHARE",
        help="of the five-word shingles that near duplicates have in common (default: %(default)s)",
    )
    add(
        "--against",
        action="append",
        default=[],
        metavar="HELDOUT",
        help="held-out text: documents that share a run of words with it are taken out; may be repeated",
    )
    add("--run-words", type=int, default=Choices.run_words, metavar="N", help="length of a run (default: %(default)s)")
    add(
        "--overlap",
        type=int,
        default=Choices.overlap,
        metavar="N",
        help="take a document out for so many different runs (default: %(default)s)",
    )
    add("--report-only", action="store_true", help="write no text, only report what would be taken out")
    add("--removed-texts", action="store_true", help="list the texts of what was taken out, too")
    add("--format", choices=SUFFIXES, default=SUFFIXES[0], help="of the files to write (default: %(default)s)")
    add(
        "--max-skipped",
        default=Choices.max_skipped,
        metavar="N|P%",
        help="stop where more documents than this cannot be read "
        f"(default: {Choices.max_skipped.replace('%', '%%')} of them)",
    )
    add("--workers", type=int, metavar="N", help="processes (default: one a core)")
    _add_reading(parser.add_argument_group("reading"), "")
    _add_reading(parser.add_argument_group("reading of held-out texts"), "against-")


def _add_reading(parser: argparse._ActionsContainer, prefix: str) -> None:
    add, usual = parser.add_argument, Reading()
    add(
        f"--{prefix}text-column",
        default=usual.text,
        metavar="NAME",
        help=f"the column or key of the text (default: {usual.text})",
    )
    add(f"--{prefix}template", metavar="TEXT", help='text of several columns, such as "{question} {answer}"')
    add(f"--{prefix}id-column", metavar="NAME", help='the column of the documents\' ids (default: "id", if there)')
    add(
        f"--{prefix}txt",
        choices=("file", "line", "paragraph"),
        default=usual.txt,
        help=f"what a document of a .txt file is (default: {usual.txt})",
    )


def run(args: argparse.Namespace) -> int:
    if args.list_filters:
        for name in FILTERS:
            print("\n".join(f"{name}.{key}={json.dumps(value)}" for key, value in settings_of(name).items()))
        return 0
    choices = Choices(
        filters=chosen_filters(_names(args.filters), args.set),
        dedup=_names(args.dedup),
        similarity=args.similarity,
        against=args.against,
        against_reading=Reading(
            args.against_text_column, args.against_template, args.against_id_column, args.against_txt
        ),
        run_words=args.run_words,
        overlap=args.overlap,
        reading=Reading(args.text_column, args.template, args.id_column, args.txt),
        max_skipped=args.max_skipped,
        report_only=args.report_only,
        removed_texts=args.removed_texts,
        suffix=args.format,
    )
    command = shlex.join(["llama-dist", *sys.argv[1:]])
    started_at = time.monotonic()
    report = clean(args.inputs, args.out, choices, workers=args.workers, command=command, tell=_Teller())
    seconds = time.monotonic() - started_at
    print("\n".join(report.lines()))
    size = report.counts.came.bytes
    print(f"{seconds:.1f} s, {size / 1e6 / max(seconds, 1e-9):.1f} MB/s" + (f"; {args.out}" if args.out else ""))
    return 0


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


class _Teller:
    """Says to stderr how far the work is, not too often."""

    def __init__(self) -> None:
        self._told_at = time.monotonic()

    def __call__(self, line: str) -> None:
        if time.monotonic() - self._told_at >= TELL_SECONDS:
            self._told_at = time.monotonic()
            print(f"llama-dist clean: {line}", file=sys.stderr, flush=True)

