"""A sentencepiece model as a tokenizer; where its pieces do not cross words, words are looked up, not encoded again."""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from llama_dist.data.encoded import as_bytes, joined, require_text
from llama_dist.errors import UserError

SPACE = "\u2581"
"""How sentencepiece spells a space within pieces. In a text it is taken for a space."""
MAX_WORDS = 1 << 18
"""Words remembered, about 200 bytes each; as many of the time before are kept until it is full again."""
MAX_WORD_CHARACTERS = 64
CHUNK_CHARACTERS = 1 << 18
"""Longer texts are encoded by parts of about this size: sentencepiece takes 50 bytes of memory for a byte of text."""

_WORD_BEGINS = re.compile(rf"(?<![ {SPACE}]) |\n")


class SentencePieceTokenizer:
    """A sentencepiece model; ids equal sentencepiece's own."""

    def __init__(self, path: Path) -> None:
        content = path.read_bytes()
        model = ModelProto()
        try:
            model.ParseFromString(content)
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except (DecodeError, RuntimeError, UnicodeDecodeError) as error:
            raise UserError(
                f"{path}: not a sentencepiece model, nor a file of tiktoken ranks; give one of these, "
                "or a Hugging Face tokenizer.json"
            ) from error
        if self._processor.eos_id() < 0:
            raise UserError(f"{path}: the model has no eos token, which ends a document; train it with one")
        bos_id = self._processor.bos_id()
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int | None = bos_id if bos_id >= 0 else None
        self.eos_id: int = self._processor.eos_id()
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self._words = Words(model) if words_are_independent(model) else None

    def encode(self, text: str) -> list[int]:
        require_text([text])
        return np.frombuffer(self._encoded(text), np.int32).tolist()

    def encode_batch(self, texts: Sequence[str], *, bos_eos: bool = False) -> tuple[np.ndarray, np.ndarray]:
        require_text(texts)
        encoded = [self._encoded(text) for text in texts]
        return joined(encoded, bos_id=self.bos_id, eos_id=self.eos_id) if bos_eos else joined(encoded)

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def _encoded(self, text: str) -> bytes:
        if self._words is None or not text:
            return as_bytes(self._processor.encode(text))
        text = " " + text  # as sentencepiece does
        chunks = [text] if len(text) <= CHUNK_CHARACTERS else _chunks(text, CHUNK_CHARACTERS)
        return b"".join(map(self._words.encoded, chunks))


class Words(dict[str, bytes]):
    """Word, with the spaces before it -> its ids as int32 bytes; encoded at first use, later forgotten."""

    def __init__(self, model: ModelProto) -> None:
        super().__init__()
        bare = ModelProto()
        bare.CopyFrom(model)
        bare.normalizer_spec.add_dummy_prefix = False
        self._encode = sentencepiece.SentencePieceProcessor(model_proto=bare.SerializeToString()).encode
        self._cut = word_pattern(model).findall
        self._before: dict[str, bytes] = {}

    def encoded(self, text: str) -> bytes:
        """The ids of `text` as it is: no space is put in front."""
        return b"".join(map(self.__getitem__, self._cut(text)))

    def __missing__(self, word: str) -> bytes:
        ids = self._before.get(word)
        if ids is None:
            ids = as_bytes(self._encode(word))
        if len(word) <= MAX_WORD_CHARACTERS:
            if len(self) >= MAX_WORDS:
                self._before = dict(self)
                self.clear()
            self[word] = ids
        return ids


def words_are_independent(model: ModelProto) -> bool:
    """Whether the ids of a text are those of its words, cut around newlines and before spaces that follow no space.

    So it is where the text reaches the merges as it is and no piece crosses such a cut: merges go by the scores of
    the pieces alone, so what is merged on one side of a cut is nothing to the other side. Without byte fallback,
    neighbouring unknown characters would become one id. User-defined pieces are cut out by other rules.
    """
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    crossing = re.compile(rf"[^{SPACE}]{SPACE}|.\n|\n.", re.DOTALL)
    return (
        trainer.model_type == trainer.BPE
        and trainer.byte_fallback
        and not trainer.treat_whitespace_as_suffix
        and not normalizer.precompiled_charsmap
        and normalizer.add_dummy_prefix
        and normalizer.escape_whitespaces
        and not normalizer.remove_extra_whitespaces
        and not any(piece.type == piece.USER_DEFINED or crossing.search(piece.piece) for piece in model.pieces)
    )


def word_pattern(model: ModelProto) -> re.Pattern[str]:
    """Finds the words of a text, given that `words_are_independent`.

    Words are cut further, between letters and what is no letter: so many more of them are found again ("(x," is three).
    Letters are those of ASCII, and all that stand beside a letter in a piece; no piece crosses that cut either.
    """
    beside: dict[str, set[str]] = {}
    for piece in model.pieces:
        if piece.type in (piece.NORMAL, piece.UNUSED):
            characters = piece.piece.lstrip(SPACE)
            for left, right in zip(characters, characters[1:], strict=False):
                beside.setdefault(left, set()).add(right)
                beside.setdefault(right, set()).add(left)
    letters, new = set[str](), set(string.ascii_letters)
    while new:
        letters |= new
        new = {neighbour for letter in new for neighbour in beside.get(letter, ())} - letters
    alphabet = "".join(map(re.escape, sorted(letters)))
    return re.compile(rf"[ {SPACE}]*(?:[{alphabet}]+|[^{alphabet} {SPACE}\n]+)|[ {SPACE}]+|\n")


def _chunks(text: str, size: int) -> Iterator[str]:
    start = 0
    while cut := _WORD_BEGINS.search(text, start + size):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]
