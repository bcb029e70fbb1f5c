"""`llama-dist train`: pretrain, or go on with a run."""

from __future__ import annotations

import argparse

from llama_dist.config import load_config
from llama_dist.train.session import run_training

DESCRIPTION = """\
Pretrain the run that CONFIG describes. On an unfinished run the same command goes on from the newest checkpoint that
verifies; on a finished one it says so. Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP finish the step, save and stop (status 75).
Started alone it is one rank; a launcher (launch/local.sh, torchrun, deepspeed, srun, mpirun) makes it many."""
EPILOG = """\
examples:
  llama-dist train configs/run/tiny.yaml
  llama-dist train configs/run/default.yaml train.steps=50 parallel.zero=2 folder=runs/short
  launch/local.sh 2 configs/run/default.yaml
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("config", metavar="CONFIG", help="the run's YAML file, such as configs/run/default.yaml")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="settings that replace those of the file: train.steps=100"
    )


def run(args: argparse.Namespace) -> int:
    return run_training(load_config(args.config, args.overrides))
