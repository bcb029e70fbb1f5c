"""Encoded texts as bytes: what the tokenizers share."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import numpy as np


def as_bytes(ids: Iterable[int]) -> bytes:
    """Ids as int32, in the byte order of the machine; for a few of them three times as fast as numpy."""
    return array("i", ids).tobytes()


def joined(texts: Sequence[bytes], *, bos_id: int | None = None, eos_id: int | None = None) -> tuple[
    np.ndarray, np.ndarray
]:  # fmt: skip
    """The ids of all `texts`, given as int32 bytes, one after another (int32), and how many each has (int64).

    `bos_id` goes before and `eos_id` after the ids of each text, where they are not None.
    """
    bos, eos = (as_bytes([] if mark is None else [mark]) for mark in (bos_id, eos_id))
    lengths = np.fromiter(map(len, texts), np.int64, len(texts)) + len(bos + eos)
    parts: Iterable[bytes] = texts
    if bos or eos:
        parts = (part for text in texts for part in (bos, text, eos))
    # A bytearray, because numpy does not let one write to bytes.
    return np.frombuffer(bytearray().join(parts), np.int32), lengths // np.dtype(np.int32).itemsize


def require_text(texts: Iterable[str]) -> None:
    """Raise UnicodeEncodeError where one of `texts` holds half of a surrogate pair, and so is no text.

    JSON can spell such halves ("\\\\ud800"); each tokenizer library has an error of its own for them, or replaces them.
    """
    for text in texts:
        if not text.isascii():
            text.encode()
