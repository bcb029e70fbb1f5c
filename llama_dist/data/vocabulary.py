"""Vocabularies: training a sentencepiece model on raw text, the same text giving the same bytes."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from llama_dist.errors import UserError
from llama_dist.files import write_file

MAX_VOCAB_SIZE = 10_000_000
SAMPLE_BYTES = 32 << 20
CHARACTER_COVERAGE = 0.99995
LEAST_COVERAGE = 0.98
LINE_CHARACTERS = 2000
"""sentencepiece drops a line longer than `max_sentence_length` bytes; longer ones are cut at this many characters."""


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int,
    out: str | Path,
    sample_bytes: int = SAMPLE_BYTES,
    character_coverage: float = CHARACTER_COVERAGE,
) -> bool:
    """Train a byte-pair vocabulary with byte fallback on `texts` and write it to `out`.

    The same texts give the same bytes. At most `sample_bytes` of text are used: lines drawn evenly over all of it. The
    rarest characters, beyond `character_coverage` of the text, get no piece and are spelled in bytes.
    Returns whether it was written: False where `out` holds that very vocabulary already.
    Raises UserError where there is no text, the text is too small or too rich for `vocab_size`, `out` is another, or a
    number makes no sense.
    """
    out = Path(out)
    if not 0 < vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(f"vocab_size={vocab_size}: must be from 1 to {MAX_VOCAB_SIZE}; 4096 to 128000 are usual")
    if sample_bytes < 1:
        raise UserError(f"sample_bytes={sample_bytes}: must be at least 1; {SAMPLE_BYTES} are usual")
    if not LEAST_COVERAGE <= character_coverage <= 1:
        raise UserError(
            f"character_coverage={character_coverage}: must be from {LEAST_COVERAGE} to 1; "
            f"{CHARACTER_COVERAGE} is usual"
        )
    lines = sample_lines(texts, max_bytes=sample_bytes)
    if not lines:
        raise UserError(f"tokenizer {out}: the input has no text; give at least a few kilobytes of it")
    model = _train(lines, vocab_size, character_coverage)
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


def _train(lines: list[str], vocab_size: int, character_coverage: float) -> bytes:
    buffer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=buffer,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            character_coverage=character_coverage,
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
