"""`llama-dist eval`: measure a checkpoint."""

from __future__ import annotations

import argparse
import json
import sys

from llama_dist.checkpoint.whole import check_tokenizer, config_of, find_checkpoint, load_model
from llama_dist.config import RunConfig, build_config
from llama_dist.errors import UserError
from llama_dist.eval.scoring import PlainScorer, Replica
from llama_dist.runtime import best_device
from llama_dist.train.evaluation import Evaluation, describe

DESCRIPTION = """\
Measure a checkpoint in one process: perplexity on held-out shards and accuracy on multiple-choice benchmarks. What is
measured is what its run's config names, unless the options say otherwise."""
EPILOG = """\
examples:
  llama-dist eval runs/default
  llama-dist eval runs/default/checkpoints/step-00000100 --heldout runs/default/shards/heldout --max-samples 50
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run folder for its newest one")
    parser.add_argument("--heldout", metavar="SHARDS", help="shard directory to measure perplexity on")
    parser.add_argument(
        "--choices", metavar="FILE", action="append", help="a multiple-choice .jsonl file; may be given several times"
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="the tokenizer's file, where it has moved since training")
    parser.add_argument("--max-samples", type=int, metavar="N", help="the first N samples of each (0: all)")
    parser.add_argument("--batch", type=int, metavar="N", help="sequences at a time")
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object")


def run(args: argparse.Namespace) -> int:
    checkpoint, passed_over = find_checkpoint(args.checkpoint)
    for problem in passed_over:
        print(f"checkpoint passed over: {problem}", file=sys.stderr)
    config = _config(config_of(checkpoint), args)
    evaluation = Evaluation(config)
    check_tokenizer(checkpoint, evaluation.tokenizer)
    results = evaluation(PlainScorer(load_model(checkpoint).to(best_device()), device=best_device()), replica=Replica())
    if not results:
        raise UserError(f"{checkpoint}: its run's config names nothing to evaluate; give --heldout or --choices")
    if args.json:
        print(json.dumps({"checkpoint": str(checkpoint), "step": checkpoint.position.step, "results": results}))
        return 0
    print(f"{checkpoint} (step {checkpoint.position.step})")
    for task, result in results.items():
        print(describe(task, result))
    return 0


def _config(config: RunConfig, args: argparse.Namespace) -> RunConfig:
    """The checkpoint's config with what the command line names in its place, checked like any config."""
    values = config.model_dump(mode="json")
    if args.heldout or args.choices:
        values["data"]["heldout"] = args.heldout
        values["eval"]["perplexity"] = args.heldout is not None
        values["eval"]["choices"] = args.choices or []
        values["eval"]["every"] = 0
    if args.tokenizer:
        values["data"]["tokenizer"] = args.tokenizer
    for name, value in (("max_samples", args.max_samples), ("batch", args.batch)):
        if value is not None:
            values["eval"][name] = value
    return build_config(RunConfig, values, where="options")
