"""`llama-dist data why`: the documents that a step of a run is made of."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from llama_dist.config import RunConfig, load_config
from llama_dist.data.documents import with_line
from llama_dist.data.history import History, Pace, continue_history
from llama_dist.data.mixture import Mixture
from llama_dist.data.sources import open_sources
from llama_dist.data.stream import STREAMS, Spools
from llama_dist.data.tokenizer import Tokenizer, load_tokenizer
from llama_dist.data.why import Explained, explain
from llama_dist.errors import UserError
from llama_dist.files import read_json_lines
from llama_dist.layout import Layout
from llama_dist.train.ledger import LEDGER

DESCRIPTION = """\
Print which documents the samples of a step are made of: file, document, tokens, and how each sample begins. It is
computed, not recorded, so it tells of any step, before it is trained or long after. Of a run folder it takes what the
run has read so far, with every change of batch and mixture; of a config, a run that begins with it."""
EPILOG = """\
examples:
  llama-dist data why runs/default --step 300
  llama-dist data why configs/run/default.yaml --step 12 --dp 4 --replica 1
  llama-dist data why runs/default --step 300 --json | head -3
"""
SHOWN = 32  # tokens of a sample's beginning


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = "Look at what a run reads.", EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    why = actions.add_parser(
        "why",
        help="say which documents a step is made of",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    why.add_argument("run", metavar="RUN", type=Path, help="a run folder, or the YAML file of a run")
    why.add_argument("--step", metavar="N", type=int, required=True, help="counted from 1, as the console does")
    why.add_argument("--replica", metavar="R", type=int, help="only what replica R reads, from 0")
    why.add_argument("--rank", metavar="K", type=int, help="only what rank K of the step's layout read (run folders)")
    why.add_argument("--dp", metavar="D", type=int, help="replicas, with --replica (default: as the step had)")
    why.add_argument("--json", action="store_true", help="a line of JSON for each sample")


def run(args: argparse.Namespace) -> int:
    path: Path = args.run
    if args.step < 1:
        raise UserError(f"--step={args.step}: steps count from 1")
    events = read_json_lines(path / LEDGER) if (path / LEDGER).is_file() else []
    if path.is_dir() and not events:
        raise UserError(f"{path}: is no run folder ({LEDGER}); name one, or the YAML file of a run")
    config = load_config(path / "config.yaml" if path.is_dir() else path)
    spools = Spools((path if path.is_dir() else Path(config.folder)) / STREAMS)
    history = _history(config, events, args.step, spools)
    positions = history.positions_of(args.step)
    shown = _share(positions, args, config, _layout(events, args.step))
    tokenizer = load_tokenizer(config.data.tokenizer)
    if not args.json:
        mixture = history.words(Mixture(history.phases).phase_at(positions[0]))
        print(f"step {args.step} of {path}: samples {positions[0]} to {positions[-1]} of the run; {mixture}")
    for sample in explain(history, shown, config.data, vocab_size=config.model.vocab_size, spools=spools):
        print(_as_json(sample, tokenizer) if args.json else _in_words(sample, tokenizer))
    return 0


def _history(config: RunConfig, events: list[dict[str, Any]], step: int, spools: Spools) -> History:
    """What the newest start of a run has recorded, or how the run of a config would begin."""
    recorded = [event for event in events if event["event"] == "data"]
    if recorded:
        return History.from_json(recorded[-1]["history"])
    sources = open_sources(config.data, vocab_size=config.model.vocab_size, spools=spools)
    present = [opened.present(source) for opened, source in zip(sources, config.data.train, strict=True)]
    now = Pace(0, 0, config.train.global_batch)
    return continue_history(None, present, config.data.curriculum, now=now, steps=step)[0]


def _share(positions: range, args: argparse.Namespace, config: RunConfig, layout: Layout | None) -> range:
    """The positions that were asked for: those of one replica, or all. `layout`: the step's, where it is known."""
    if args.replica is None and args.rank is None:
        return positions
    replica, dp = args.replica, args.dp
    if args.rank is not None:
        if layout is None or not 0 <= args.rank < layout.world:
            known = f"the step's layout has ranks 0 to {layout.world - 1}" if layout else "no layout is known here"
            raise UserError(f"--rank={args.rank}: {known}; use --replica with --dp")
        replica, dp = layout.coord(args.rank).dp, layout.dp
    elif dp is None:
        dp = layout.dp if layout else config.parallel.dp
    if dp == "auto":
        raise UserError(f"--replica={replica}: parallel.dp is auto; say of how many replicas with --dp")
    if dp < 1 or len(positions) % dp or not 0 <= replica < dp:
        raise UserError(
            f"--replica={replica} of --dp={dp}: the {len(positions)} samples of a step are shared out over a number of "
            "replicas that divides it, counted from 0"
        )
    share = len(positions) // dp
    return positions[replica * share : (replica + 1) * share]


def _layout(events: list[dict[str, Any]], step: int) -> Layout | None:
    """The layout of the start that made a step last, or would make it."""
    begun = [event["attempt"] for event in events if event["event"] == "data" and event["step"] < step]
    starts = [event for event in events if event["event"] == "start" and event["attempt"] in begun[-1:]]
    return Layout(**starts[-1]["layout"]) if starts else None


def _in_words(sample: Explained, tokenizer: Tokenizer) -> str:
    epoch = "" if sample.epoch is None else f" in epoch {sample.epoch + 1}"
    lines = [f"sample {sample.position}: {sample.source}, its sample {sample.sample}{epoch}"]
    for part in sample.parts:
        where = "" if part.origin is None else f" ({_where(*part.origin)})"
        tokens = f"tokens {part.start} to {part.stop - 1} of {part.size}"
        lines.append(f"  {part.file}: document {part.document}{where}, {tokens}")
    return "\n".join([*lines, f"  {_beginning(sample, tokenizer)!r}"])


def _as_json(sample: Explained, tokenizer: Tokenizer) -> str:
    values = {
        "position": sample.position,
        "source": sample.source,
        "sample": sample.sample,
        "epoch": sample.epoch,
        "documents": [
            {
                "file": part.file,
                "document": part.document,
                "input": part.origin and part.origin[0],
                "id": part.origin and with_line(part.origin[1]),
                "start": part.start,
                "stop": part.stop,
                "tokens": part.size,
            }
            for part in sample.parts
        ],
        "begins": _beginning(sample, tokenizer),
    }
    return json.dumps(values)


def _beginning(sample: Explained, tokenizer: Tokenizer) -> str:
    tokens = sample.tokens[:SHOWN]
    if not 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size:
        raise UserError(
            f"{sample.parts[0].file}: holds ids from {tokens.min()} to {tokens.max()}, and the vocabulary has "
            f"{tokenizer.vocab_size}; the shards are damaged, or are another tokenizer's; see `llama-dist verify`"
        )
    return tokenizer.decode(tokens.tolist())


def _where(path: str, id: str) -> str:
    """The input of a document and its id there, which may begin with it."""
    place = with_line(id)
    return place if place.startswith(path) else f"{path}: {place}"
