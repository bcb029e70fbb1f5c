"""Small texts, a small tokenizer and small shards for the tests of the data layer."""

from __future__ import annotations

import json
import tempfile
from functools import lru_cache
from pathlib import Path

from llama_dist.data.prepare import prepare
from llama_dist.data.vocabulary import train_tokenizer

WORDS = "the cat sat on a mat and then it ran over every hill to find some old red hat under one big tree".split()


def text_of(number: int, *, words: int = 60) -> str:
    """Some text that differs with its number."""
    chosen = (WORDS[(number * 7 + i * i + i // 3) % len(WORDS)] for i in range(words))
    return f"document {number}: " + " ".join(chosen) + "\n"


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@lru_cache(maxsize=1)
def small_tokenizer() -> Path:
    """A sentencepiece model of 340 pieces, trained once a run of the tests."""
    out = Path(tempfile.mkdtemp(prefix="llama-dist-test-")) / "small.model"
    train_tokenizer((text_of(i) for i in range(50)), vocab_size=340, out=out)
    return out


def make_shards(folder: Path, *, documents: int = 40, first: int = 0, pair_tokens: int = 1 << 30) -> Path:
    """A shard directory of small documents, with its input beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    source = write_jsonl(folder / f"texts-{first}.jsonl", [text_of(first + i) for i in range(documents)])
    prepare([source], small_tokenizer(), folder / f"shards-{first}", workers=1, pair_tokens=pair_tokens)
    return folder / f"shards-{first}"
