"""Tokenizers: text <-> token ids, from a sentencepiece model or a Hugging Face tokenizer.json; training one."""

from __future__ import annotations

import hashlib
import io
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece
import tokenizers

from llama_dist.errors import UserError
from llama_dist.files import write_file

BOS_NAMES = ("<s>", "<|begin_of_text|>")
EOS_NAMES = ("</s>", "<|end_of_text|>", "<|endoftext|>")
CHUNK_CHARACTERS = 1 << 18
MAX_VOCAB_SIZE = 10_000_000
SAMPLE_BYTES = 32 << 20
LINE_CHARACTERS = 2000
"""sentencepiece drops a line longer than `max_sentence_length` bytes; longer ones are cut at this many characters."""


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
    """Read a sentencepiece `.model`, a Hugging Face `tokenizer.json`, or a folder that holds one of them.

    Raises UserError where there is no such file, it is of another kind, or it has no end-of-document token.
    """
    path = _tokenizer_file(Path(path))
    return HuggingFaceTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)


def fingerprint_of(path: str | Path) -> str:
    """The sha256 of a tokenizer's file, which is `load_tokenizer(path).fingerprint` without loading it."""
    return hashlib.sha256(_tokenizer_file(Path(path)).read_bytes()).hexdigest()


class SentencePieceTokenizer:
    """A sentencepiece model; ids equal sentencepiece's own."""

    def __init__(self, path: Path) -> None:
        proto = path.read_bytes()
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except RuntimeError as error:
            raise UserError(
                f"{path}: not a sentencepiece model; allowed are a sentencepiece .model and a Hugging Face "
                "tokenizer.json; for a tiktoken rank file (LLaMA-3) give the tokenizer.json that lies beside it"
            ) from error
        if self._processor.eos_id() < 0:
            raise UserError(f"{path}: the model has no eos token, which ends a document; train it with one")
        bos_id = self._processor.bos_id()
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int | None = bos_id if bos_id >= 0 else None
        self.eos_id: int = self._processor.eos_id()
        self.fingerprint = hashlib.sha256(proto).hexdigest()
        self._num_prefix_ids = 2 * len(self._ids("\n")) - len(self._ids("\n\n"))
        self._can_cut = self._lines_are_independent()

    def encode(self, text: str) -> list[int]:
        if len(text) <= CHUNK_CHARACTERS or not self._can_cut:
            return self._ids(text)
        return self._encode_in_chunks(text, CHUNK_CHARACTERS)

    def encode_batch(self, texts: Sequence[str], *, bos_eos: bool = False) -> tuple[np.ndarray, np.ndarray]:
        return _joined([self.encode(text) for text in texts], self if bos_eos else None)

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def _ids(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def _encode_in_chunks(self, text: str, size: int) -> list[int]:
        """The same ids as in one go, which would take 50 bytes of memory a byte of text.

        A later chunk begins with a newline, so the space that sentencepiece puts in front stays a token apart.
        """
        ids: list[int] = []
        start = 0
        while start < len(text):
            stop = text.find("\n", start + size)
            stop = len(text) if stop < 0 else stop
            ids += self._ids(text[start:stop])[self._num_prefix_ids if start else 0 :]
            start = stop
        return ids

    def _lines_are_independent(self) -> bool:
        """Whether no piece reaches over a newline and the normalizer keeps newlines as they are."""
        if self.decode(self._ids("a\nb")) != "a\nb":
            return False
        pieces = (self._processor.id_to_piece(i) for i in range(self.vocab_size))
        if any("\n" in piece and piece != "\n" for piece in pieces):
            return False
        probe = "a b\nc\n\n  d\n \n"
        return self._encode_in_chunks(probe, 1) == self._ids(probe)


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
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def encode_batch(self, texts: Sequence[str], *, bos_eos: bool = False) -> tuple[np.ndarray, np.ndarray]:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return _joined([item.ids for item in encoded], self if bos_eos else None)

    def decode(self, ids: list[int]) -> str:
        special = {self.bos_id, self.eos_id}
        return self._tokenizer.decode([i for i in ids if i not in special], skip_special_tokens=False)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, out: str | Path) -> bool:
    """Train a byte-pair vocabulary with byte fallback on `texts` and write it to `out`.

    The same texts give the same bytes. At most SAMPLE_BYTES of text are used: lines drawn evenly over all of it.
    Returns whether it was written: False where `out` holds that very vocabulary already.
    Raises UserError where there is no text, the text is too small or too rich for `vocab_size`, or `out` is another.
    """
    out = Path(out)
    if not 0 < vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(f"vocab_size={vocab_size}: must be from 1 to {MAX_VOCAB_SIZE}; 4096 to 128000 are usual")
    lines = sample_lines(texts, max_bytes=SAMPLE_BYTES)
    if not lines:
        raise UserError(f"tokenizer {out}: the input has no text; give at least a few kilobytes of it")
    model = _train(lines, vocab_size)
    if out.exists():
        if out.is_file() and out.read_bytes() == model:
            return False
        raise UserError(
            f"{out}: is another tokenizer, and token shards may lean on it; "
            "remove it first or choose another --out"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, model)
    return True


def sample_lines(texts: Iterable[str], *, max_bytes: int) -> list[str]:
    """Lines drawn evenly from all of `texts`, in order, of `max_bytes` at most, in one pass and bounded memory.

    Each line has a fixed pseudo-random rank; whenever too much is held, the half with the higher ranks goes.
    """
    kept: list[tuple[int, str]] = []
    limit, held = 1 << 32, 0
    for number, line in enumerate(_lines_of(texts)):
        rank = zlib.crc32(number.to_bytes(8, "little"))
        if rank >= limit:
            continue
        kept.append((rank, line))
        held += len(line.encode())
        while held > max_bytes and limit > 1:
            limit //= 2
            kept = [item for item in kept if item[0] < limit]
            held = sum(len(item[1].encode()) for item in kept)
    return [line for _, line in kept]


def _lines_of(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            # The trainer takes no NUL; in text it is encoded by its byte.
            line = line.replace("\0", " ")
            for start in range(0, len(line), LINE_CHARACTERS):
                piece = line[start : start + LINE_CHARACTERS]
                if not piece.isspace():
                    yield piece


def _train(lines: list[str], vocab_size: int) -> bytes:
    buffer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=buffer,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            character_coverage=0.99995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * LINE_CHARACTERS,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,  # recorded in the model, so the machine's number of cores would change its bytes
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explain(error, vocab_size) from error
    return buffer.getvalue()


def _explain(error: RuntimeError, vocab_size: int) -> UserError:
    text = str(error)
    if too_high := re.search(r"set it to a value <= (\d+)", text):
        return UserError(
            f"vocab_size={vocab_size}: the text is too small for so many pieces; "
            f"at most {too_high[1]} are possible; lower it or give more text"
        )
    if too_low := re.search(r"smaller than required_chars\. \d+ vs (\d+)", text):
        return UserError(
            f"vocab_size={vocab_size}: the bytes, special tokens and characters of the text alone take {too_low[1]}; "
            f"raise it to {int(too_low[1]) + 1} or more"
        )
    return UserError(f"vocab_size={vocab_size}: sentencepiece could not train on this text: {text}")


def _joined(ids: list[list[int]], marks: Tokenizer | None) -> tuple[np.ndarray, np.ndarray]:
    """Lists of ids as one array and their lengths, with the bos and eos of `marks` around each."""
    if marks is not None:
        before = [] if marks.bos_id is None else [marks.bos_id]
        ids = [[*before, *item, marks.eos_id] for item in ids]
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    return np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum())), lengths


def _tokenizer_file(path: Path) -> Path:
    if path.is_dir():
        for name in ("tokenizer.model", "tokenizer.json"):
            if (path / name).is_file():
                return path / name
        raise UserError(f"{path}: no tokenizer in this folder; it must hold tokenizer.model or tokenizer.json")
    if not path.is_file():
        raise UserError(
            f"{path}: there is no such tokenizer file; give a sentencepiece .model or a Hugging Face tokenizer.json, "
            "or make one with `llama-dist tokenizer train`"
        )
    return path


def _first_id(tokenizer: tokenizers.Tokenizer, names: tuple[str, ...]) -> int | None:
    return next((i for i in map(tokenizer.token_to_id, names) if i is not None), None)
