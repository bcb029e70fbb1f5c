"""The command line: `llama-dist COMMAND ...`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from llama_dist import __version__
from llama_dist.errors import UserError

# The modules are imported by name when they are chosen: torch and deepspeed take seconds, --help must not.
COMMANDS = {
    "corpus": "gather real text that every machine already has, to try everything on",
    "tokenizer": "train a sentencepiece vocabulary",
    "prepare": "turn text into token shards",
    "train": "pretrain, or go on with a run",
    "eval": "measure a checkpoint: perplexity and multiple choice",
    "generate": "let a checkpoint write",
    "inspect": "say what a run, a checkpoint or a shard directory holds",
}
EXIT_USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. A UserError is printed without a traceback and gives status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in COMMANDS:
        _overview().parse_args(argv or ["--help"])
        return 0  # --help and --version end in parse_args, and so does an unknown command, with status 2
    command = importlib.import_module(f"llama_dist.commands.{argv[0]}")
    parser = argparse.ArgumentParser(prog=f"llama-dist {argv[0]}")
    command.add_arguments(parser)
    args = parser.parse_args(argv[1:])
    try:
        return command.run(args)
    except UserError as error:
        # Every rank finds the same mistake; a reader wants to be told once.
        if os.environ.get("RANK", "0") == "0":
            print(f"llama-dist {argv[0]}: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print(f"llama-dist {argv[0]}: interrupted", file=sys.stderr)
        return 130


def _overview() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="llama-dist",
        description="Multi-node LLaMA pretraining where the layout never changes the mathematics.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
        + "\n\n`llama-dist COMMAND --help` says more of one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="llama-dist [-h] [--version] COMMAND ...",
    )
    parser.add_argument("--version", action="version", version=f"llama-dist {__version__}")
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND", help="one of those below")
    return parser
