"""`llama-dist diff`: two checkpoints compared by logical tensor."""

from __future__ import annotations

import argparse
import sys

from llama_dist.checkpoint.plan import STATES
from llama_dist.exchange.difference import Difference, differences
from llama_dist.exchange.weights import Weights, open_weights

EXIT_DIFFERENT = 1
DESCRIPTION = """\
Compare two checkpoints by logical tensor, whatever layouts saved them, also with weights of Hugging Face's or Meta's."""
EPILOG = """\
The status is 0 where all bits are equal, 1 where anything differs, 2 where something cannot be read. `largest` is the
largest difference of two elements, `relative` the norm of the difference over the norm of A.

examples:
  llama-dist diff runs/one runs/other
  llama-dist diff runs/one/checkpoints/step-00000100 runs/one/checkpoints/step-00000200 --states all
  llama-dist diff runs/smollm SmolLM2-135M
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("a", metavar="A", help="a run, a checkpoint (also behind a URL), or weights that import takes")
    parser.add_argument("b", metavar="B", help="the same")
    parser.add_argument(
        "--states", choices=("weights", "all"), default="weights", help="all: the optimizer's too (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    states = STATES if args.states == "all" else STATES[:1]
    a, b = _open(args.a, states), _open(args.b, states)
    print(f"A {a.where}\nB {b.where}")
    counts = {"equal": 0, "different": 0, "only in one": 0}
    largest = relative = 0.0
    for one in differences(a, b):
        counts["equal" if one.equal else "only in one" if one.problem.startswith("is only") else "different"] += 1
        largest, relative = max(largest, one.largest), max(relative, one.relative)
        if not one.equal:
            print(f"  {one.name:<52} {_words(one)}")
    total = sum(counts.values())
    if counts["equal"] == total:
        print(f"equal: all {total} tensors, bit for bit")
        return 0
    summary = ", ".join(f"{number} {what}" for what, number in counts.items() if number)
    print(f"different: of {total} tensors {summary}; largest {largest:.3g}, relative at most {relative:.3g}")
    return EXIT_DIFFERENT


def _words(one: Difference) -> str:
    return one.problem or f"largest {one.largest:.3g}  relative {one.relative:.3g}"


def _open(path: str, states: tuple[str, ...]) -> Weights:
    weights, passed_over = open_weights(path, states)
    for problem in passed_over:
        print(f"checkpoint passed over: {problem}", file=sys.stderr)
    return weights
