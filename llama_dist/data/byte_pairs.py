"""Byte-level vocabularies: a Hugging Face `tokenizer.json`, and the ranks of tiktoken with LLaMA-3's rules."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tiktoken
import tokenizers

from llama_dist.data.encoded import as_bytes, joined, require_text
from llama_dist.data.long_texts import PART_CHARACTERS, LongTexts
from llama_dist.errors import UserError

BOS_NAMES = ("<s>", "<|begin_of_text|>")
EOS_NAMES = ("</s>", "<|end_of_text|>", "<|endoftext|>")

# From here on as Meta's reference of LLaMA-3 has it (llama_models/llama3/tokenizer.py).
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL_TOKENS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
    "<|eot_id|>", "<|python_tag|>", "<|image|>",
    *(f"<|reserved_special_token_{number}|>" for number in range(2, 246)),
)  # fmt: skip
CHUNK_CHARACTERS = 400_000
RUN_CHARACTERS = 25_000
"""A longer run of spaces, or of no spaces, is cut: tiktoken takes the square of its length in time."""

LLAMA4_RANKS = 200_000
_RANKS = re.compile(rb"\s*[A-Za-z0-9+/]+=* \d+\s*(\n|$)")


class HuggingFaceTokenizer:
    """A Hugging Face `tokenizer.json`; bos and eos are found by their usual names."""

    def __init__(self, path: Path) -> None:
        content = path.read_bytes()
        try:
            tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises plain Exception, ValueError and others
            raise UserError(f"{path}: not a Hugging Face tokenizer.json ({error}); give one, or a .model") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # Without this, a corpus that speaks of "<|endoftext|>" would end its documents with it.
        tokenizer.encode_special_tokens = True
        eos_id = _first_id(tokenizer, EOS_NAMES)
        if eos_id is None:
            raise UserError(
                f"{path}: no token to end a document with; one of {', '.join(EOS_NAMES)} is needed; "
                "add it to the tokenizer or choose another"
            )
        self._tokenizer = tokenizer
        self.vocab_size: int = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_id: int | None = _first_id(tokenizer, BOS_NAMES)
        self.eos_id: int = eos_id
        self.fingerprint = hashlib.sha256(content).hexdigest()

    def encode(self, text: str) -> list[int]:
        require_text([text])
        return np.frombuffer(self._encoded(text), np.int32).tolist()

    def encode_batch(self, texts: Sequence[str], *, bos_eos: bool = False) -> tuple[np.ndarray, np.ndarray]:
        require_text(texts)
        if any(len(text) > PART_CHARACTERS for text in texts):
            encoded = [self._encoded(text) for text in texts]
        else:
            batch = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
            encoded = [as_bytes(item.ids) for item in batch]
        return joined(encoded, bos_id=self.bos_id, eos_id=self.eos_id) if bos_eos else joined(encoded)

    def decode(self, ids: list[int]) -> str:
        special = {self.bos_id, self.eos_id}
        return self._tokenizer.decode([i for i in ids if i not in special], skip_special_tokens=False)

    def _encoded(self, text: str) -> bytes:
        if len(text) > PART_CHARACTERS:
            return b"".join(map(as_bytes, self._long_texts.encoded(text)))
        return as_bytes(self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    @cached_property
    def _long_texts(self) -> LongTexts:
        return LongTexts(self._tokenizer)  # takes a moment for a large vocabulary, and few texts are long


class TiktokenTokenizer:
    """A file of tiktoken's ranks such as LLaMA-3's `tokenizer.model`; ids equal those of Meta's reference.

    The file has the ranks alone: pattern and special tokens are LLaMA-3's.
    """

    def __init__(self, path: Path) -> None:
        ranks = parse_ranks(path)
        special = {name: len(ranks) + i for i, name in enumerate(LLAMA3_SPECIAL_TOKENS)}
        self._encoding = tiktoken.Encoding(
            str(path), pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )
        self.vocab_size: int = len(ranks) + len(special)
        self.bos_id: int | None = special["<|begin_of_text|>"]
        self.eos_id: int = special["<|end_of_text|>"]
        self.fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return np.frombuffer(self._encoded(text), np.int32).tolist()

    def encode_batch(self, texts: Sequence[str], *, bos_eos: bool = False) -> tuple[np.ndarray, np.ndarray]:
        encoded = [self._encoded(text) for text in texts]
        return joined(encoded, bos_id=self.bos_id, eos_id=self.eos_id) if bos_eos else joined(encoded)

    def decode(self, ids: list[int]) -> str:
        special = {self.bos_id, self.eos_id}
        return self._encoding.decode([i for i in ids if i not in special])

    def _encoded(self, text: str) -> bytes:
        require_text([text])
        return b"".join(
            self._encoding.encode_to_numpy(part, disallowed_special=()).tobytes() for part in _parts_for_tiktoken(text)
        )


def is_ranks(content: bytes) -> bool:
    """Whether a file's `content` begins as a file of tiktoken ranks does: base64, a space, a number."""
    return _RANKS.match(content) is not None


def parse_ranks(path: Path) -> dict[bytes, int]:
    """Token -> rank, of a file of tiktoken ranks; raises UserError with the line for a file that is damaged."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(
                f"{path}:{number}: {line[:60]!r} is no line of tiktoken ranks, which is base64, a space and a number; "
                "the file is damaged: fetch it again"
            ) from error
    lacking = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if lacking or sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(
            f"{path}: the ranks are not 0 to {len(ranks) - 1}, each once, with all 256 single bytes among them; "
            "the file is damaged: fetch it again"
        )
    if len(ranks) == LLAMA4_RANKS:
        raise UserError(
            f"{path}: has {LLAMA4_RANKS:,} ranks, which is LLaMA-4's vocabulary; its rules differ from LLaMA-3's and "
            "are not in this file; give the tokenizer.json that comes with the model"
        )
    return ranks


def _parts_for_tiktoken(text: str) -> Iterator[str]:
    """`text` cut as the reference cuts it: every CHUNK_CHARACTERS, and long runs every RUN_CHARACTERS of the run."""
    for begin in range(0, len(text), CHUNK_CHARACTERS):
        chunk = text[begin : begin + CHUNK_CHARACTERS]
        start = 0
        # Runs are short in most texts, and looking at each takes longer than this.
        for run in re.finditer(r"\s+|\S+", chunk) if len(chunk) > RUN_CHARACTERS else ():
            for cut in range(run.start() + RUN_CHARACTERS, run.end(), RUN_CHARACTERS):
                yield chunk[start:cut]
                start = cut
        yield chunk[start:]


def _first_id(tokenizer: tokenizers.Tokenizer, names: tuple[str, ...]) -> int | None:
    return next((i for i in map(tokenizer.token_to_id, names) if i is not None), None)
