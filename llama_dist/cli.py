"""The command line: `llama-dist COMMAND ...`."""

from __future__ import annotations

import argparse
import importlib
import keyword
import os
import sys
from collections.abc import Sequence

from llama_dist import __version__
from llama_dist.errors import RunError, UserError

# The modules are imported by name when they are chosen: torch and deepspeed take seconds, --help must not.
COMMANDS = {
    "corpus": "gather real text that every machine already has, to try everything on",
    "tokenizer": "train a sentencepiece vocabulary",
    "clean": "take out of text what a run should not learn from",
    "prepare": "turn text into token shards",
    "pack": "pack the documents of shards into samples, cutting few",
    "data": "say which documents a step is made of",
    "train": "pretrain, or go on with a run",
    "eval": "measure a checkpoint: perplexity and multiple choice",
    "generate": "let a checkpoint write",
    "import": "take weights of Hugging Face's or Meta's to begin a run from",
    "export": "write weights for Transformers or llama.cpp",
    "inspect": "say what a run, a checkpoint or a shard directory holds",
    "diff": "compare the weights of two checkpoints",
    "verify": "hold shards, a checkpoint or a run to all that they say of themselves",
    "settings": "print every setting of a run, with its default and what it does",
}
EXIT_RUN_ERROR = 1
EXIT_USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. A UserError is printed without a traceback and gives status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0].startswith("--local_rank="):
        argv.pop(0)  # the deepspeed launcher puts it before everything else, and says the same in LOCAL_RANK
    if not argv or argv[0] not in COMMANDS:
        _overview().parse_args(argv or ["--help"])
        return 0  # --help and --version end in parse_args, and so does an unknown command, with status 2
    # `import` cannot be the name of a module.
    command = importlib.import_module(f"llama_dist.commands.{argv[0]}{'_' * keyword.iskeyword(argv[0])}")
    parser = argparse.ArgumentParser(prog=f"llama-dist {argv[0]}")
    command.add_arguments(parser)
    args = parser.parse_args(argv[1:])
    try:
        status = command.run(args)
        sys.stdout.flush()
        return status
    except (UserError, RunError) as error:
        if argv[0] != "train" or _speaks():
            # Some texts begin with the function that complains, which is the command's namesake.
            print(f"llama-dist {argv[0]}: {str(error).removeprefix(f'{argv[0]}: ')}", file=sys.stderr)
        return EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_RUN_ERROR
    except BrokenPipeError:  # the reader, such as `head`, has seen enough; nothing more may be written there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_RUN_ERROR
    except OSError as error:
        if argv[0] == "train" or error.filename is None:
            raise  # a run tells of its files by itself, and without a file it is nothing that a user could mend
        print(f"llama-dist {argv[0]}: {error.filename}: {error.strerror}; mend the path, or name another", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print(f"llama-dist {argv[0]}: interrupted", file=sys.stderr)
        return 130


def _speaks() -> bool:
    """Whether this process is the first of its node: all ranks find a mistake, and some are those of one node only."""
    names = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")
    rank = next((os.environ[name] for name in names if name in os.environ), "0")
    return rank.strip("0123456789") != "" or int(rank or 0) == 0  # whoever has no proper rank has something to tell, too


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
