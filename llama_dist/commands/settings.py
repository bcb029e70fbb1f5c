"""`llama-dist settings`: what can stand in a run's YAML file."""

from __future__ import annotations

import argparse
import textwrap

from llama_dist.config import RunConfig
from llama_dist.config_problems import Setting, list_settings
from llama_dist.errors import UserError

DESCRIPTION = """\
Print every setting of a run: its default, what it takes and what it does. A name in full is also how a setting is
given on the command line (optim.lr=3e-4); N stands for a place in a list, from 0."""
EPILOG = """\
examples:
  llama-dist settings
  llama-dist settings optim checkpoint.every
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", metavar="NAME", nargs="*", help="a section or a setting (default: all)")


def run(args: argparse.Namespace) -> int:
    settings = list(list_settings(RunConfig))
    for name in args.names:
        if not _matching(settings, name):
            near = [setting.name for setting in settings if setting.name.endswith(f".{name}")]
            top = ", ".join(setting.name for setting in settings if "." not in setting.name)
            advice = f"did you mean {' or '.join(near)}?" if near else f"at the top are {top}"
            raise UserError(f"{name}: there is no such setting or section; {advice}")
    chosen = [setting for name in args.names for setting in _matching(settings, name)] or settings
    for setting in chosen:
        print(_describe(setting))
    return 0


def _matching(settings: list[Setting], name: str) -> list[Setting]:
    return [setting for setting in settings if setting.name == name or setting.name.startswith(f"{name}.")]


def _describe(setting: Setting) -> str:
    if "mapping with" in setting.allowed:
        return f"\n{setting.name}: {setting.doc}"
    state = setting.default if setting.default in ("required", "derived") else f"default {setting.default}"
    doc = textwrap.fill(setting.doc, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return f"  {setting.name} ({state}): {setting.allowed}\n{doc}"
