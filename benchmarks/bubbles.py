"""How much of a step each pipeline schedule waits: a Markdown table, theory beside the simulated clock.

    python benchmarks/bubbles.py                      prints it
    python benchmarks/bubbles.py --write README.md    puts it between <!-- bubbles --> and <!-- /bubbles -->

Nothing is timed and nothing is random: the table is the same on every machine.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llama_dist.files import write_file
from llama_dist.pipeline.schedule import PipelineShape, bubble, bubble_theory, peak_in_flight

MARKERS = ("<!-- bubbles -->", "<!-- /bubbles -->")
SCHEDULES = (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 4), ("zb-h1", 1))  # with virtual stages
RANKS = (2, 4, 8)
MICROBATCHES = (4, 8, 16, 32, 64)
CAPTION = f"""\
Time that a rank waits, in % of the time that it computes, by theory / on the simulated clock (a forward takes 1; a
backward 2, which zb-h1 cuts into 1 + 1; transfers are hidden). `held`: the most micro-batches of which a rank keeps
activations, of {MICROBATCHES[-1]}, each counted for the whole of the rank's layers. `-`: not a multiple of `pp`.
"""


def table() -> str:
    rows = [["schedule", "pp", "held", *(f"{m} micro-batches" for m in MICROBATCHES)]]
    rows.append([":--", *["--:"] * (len(rows[0]) - 1)])
    for name, virtual_stages in SCHEDULES:
        label = name if virtual_stages == 1 else f"{name}, {virtual_stages} virtual stages"
        for pp in RANKS:
            shapes = [PipelineShape(pp, m, virtual_stages) for m in MICROBATCHES]
            rows.append([label, str(pp), held(name, shapes[-1]), *(cell(name, shape) for shape in shapes)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def cell(name: str, shape: PipelineShape) -> str:
    if name == "interleaved" and shape.microbatches % shape.pp:
        return "-"
    return f"{100 * bubble_theory(name, shape):.1f} / {100 * bubble(name, shape):.1f}"


def held(name: str, shape: PipelineShape) -> str:
    """In micro-batches of a whole stage: a chunk is one of `virtual_stages` parts of it."""
    peak = max(rank.together for rank in peak_in_flight(name, shape))
    return f"{peak / shape.virtual_stages:g}"


def replace_block(text: str, block: str) -> str | None:
    """The text with a new block between the markers, or None where it has not one of each, in order."""
    opening, closing = MARKERS
    if text.count(opening) != 1 or text.count(closing) != 1 or text.index(opening) > text.index(closing):
        return None
    before, rest = text.split(opening)
    return f"{before}{opening}\n{block}{closing}{rest.split(closing)[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the table in this file")
    path = parser.parse_args().write
    block = f"{CAPTION}\n{table()}"
    if path is None:
        sys.stdout.write(block)
        return 0
    changed = replace_block(path.read_text(encoding="utf-8"), block)
    if changed is None:
        print(f"{path}: no place for the table; add the lines {' and '.join(MARKERS)} once, in order", file=sys.stderr)
        return 2
    write_file(path, changed.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
