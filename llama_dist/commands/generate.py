"""`llama-dist generate`: let a checkpoint write."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llama_dist.checkpoint.whole import check_tokenizer, config_of, find_checkpoint, load_model
from llama_dist.data.tokenizer import Tokenizer, load_tokenizer
from llama_dist.errors import UserError
from llama_dist.generate import generate
from llama_dist.model.hf import load_hf_model, read_end_ids
from llama_dist.model.llama import Llama
from llama_dist.runtime import best_device

BETWEEN = "-" * 40
DESCRIPTION = """\
Continue a prompt with a checkpoint's model, in one process. Without options the likeliest token is taken at each place
(greedy); --temperature, --top-k and --top-p draw instead, the same again for the same --seed."""
EPILOG = """\
examples:
  llama-dist generate "The cat sat on the" --max-new-tokens 10
  llama-dist generate "def main():" --checkpoint runs/default --temperature 0.8 --top-p 0.95 --seed 7
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("prompts", metavar="PROMPT", nargs="+", help="text to continue; several are done together")
    parser.add_argument(
        "--checkpoint",
        metavar="FOLDER",
        default="runs/default",
        help="a run folder (its newest checkpoint), a checkpoint, or a Hugging Face LLaMA (default: %(default)s)",
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="the tokenizer's file, where it has moved since training")
    parser.add_argument("--max-new-tokens", type=int, default=50, metavar="N", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: greedy (default)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest (0: all)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest that make up P")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    for text in args.prompts:
        if not text.isprintable() and any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError(f"prompt {text!r}: is not UTF-8 text; check the terminal's encoding")
    model, tokenizer = _load(Path(args.checkpoint), args.tokenizer)
    # Chat models end an answer with other tokens than a text; those of a run lie in its folder, where it was imported.
    ends = {tokenizer.eos_id, *read_end_ids(_home(Path(args.checkpoint)))}
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    prompts = [start + tokenizer.encode(text) for text in args.prompts]
    outputs = generate(
        model.to(best_device()),
        prompts,
        max_new_tokens=args.max_new_tokens,
        eos_id=ends,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        if i:
            print(BETWEEN)
        # Decoded as one text: a tokenizer may write the first piece of a text differently from one inside it.
        marks = {tokenizer.bos_id, *ends}
        print(tokenizer.decode([token for token in prompt + output if token not in marks]))
    return 0


def _home(folder: Path) -> Path:
    """The folder itself, or the run's where it is one of a run's checkpoints."""
    return folder.parent.parent if folder.parent.name == "checkpoints" else folder


def _load(folder: Path, tokenizer: str | None) -> tuple[Llama, Tokenizer]:
    if (folder / "config.json").is_file():
        files = [folder / name for name in ("tokenizer.model", "tokenizer.json") if (folder / name).is_file()]
        if not tokenizer and not files:
            raise UserError(f"{folder}: has neither tokenizer.model nor tokenizer.json; name one with --tokenizer")
        return load_hf_model(folder).eval(), load_tokenizer(tokenizer or files[0])
    checkpoint, passed_over = find_checkpoint(folder)
    for problem in passed_over:
        print(f"checkpoint passed over: {problem}", file=sys.stderr)
    loaded = load_tokenizer(tokenizer or config_of(checkpoint).data.tokenizer)
    check_tokenizer(checkpoint, loaded)
    return load_model(checkpoint), loaded
