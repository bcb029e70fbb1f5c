"""Tokenizers: text <-> token ids, by whichever library the file of the vocabulary is for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from llama_dist.data.byte_pairs import HuggingFaceTokenizer, TiktokenTokenizer, is_ranks
from llama_dist.data.sentencepieces import SentencePieceTokenizer
from llama_dist.errors import UserError


class Tokenizer(Protocol):
    """What the project needs of a tokenizer.

    `bos_id` is None where the vocabulary has no such token (GPT-2); `fingerprint` is the sha256 of the file.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, with no bos or eos; text that looks like a special token is plain text."""
        ...

    def encode_batch(self, texts: Sequence[str], *, bos_eos: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all `texts`, one after another (int32), and how many each has (int64).

        With `bos_eos`, each text is a document: bos, where there is one, before its ids, and eos after them.
        Raises UnicodeEncodeError for a text with half of a surrogate pair, which is no text.
        """
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        ...


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a sentencepiece `.model`, a Hugging Face `tokenizer.json`, LLaMA-3's `tokenizer.model` of tiktoken ranks,
    or a folder that holds one of them.

    Raises UserError where there is no such file, it is of another kind, or it has no end-of-document token.
    """
    path = _tokenizer_file(Path(path))
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path)
    return TiktokenTokenizer(path) if is_ranks(path.read_bytes()) else SentencePieceTokenizer(path)


def fingerprint_of(path: str | Path) -> str:
    """The sha256 of a tokenizer's file, which is `load_tokenizer(path).fingerprint` without loading it."""
    return hashlib.sha256(_tokenizer_file(Path(path)).read_bytes()).hexdigest()


def _tokenizer_file(path: Path) -> Path:
    if path.is_dir():
        for name in ("tokenizer.model", "tokenizer.json"):
            if (path / name).is_file():
                return path / name
        raise UserError(f"{path}: no tokenizer in this folder; it must hold tokenizer.model or tokenizer.json")
    if not path.is_file():
        raise UserError(
            f"{path}: there is no such tokenizer file; give a sentencepiece or LLaMA-3 .model, a Hugging Face "
            "tokenizer.json, or make one with `llama-dist tokenizer train`"
        )
    return path
