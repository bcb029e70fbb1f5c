"""Text as numbers: words, runs of words, and whole texts as hashes, the same on every machine and in every process."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import xxhash

# Scripts that are written without spaces (Thai, Lao, Burmese, Khmer, kana, Han): there each character is a word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_NO_WORD = re.compile(r"\W")
_SLICE = 1 << 20  # characters that are words at a time, so that a huge document costs 8 bytes a word
_CACHED_WORDS = 1 << 20


class WordHasher:
    """The words of a text as 64-bit hashes: lower case, without punctuation. Remembers the words that it has seen."""

    def __init__(self) -> None:
        self._hashes = _Hashes()

    def __call__(self, text: str) -> np.ndarray:
        """uint64, one for each word of `text`."""
        pieces = []
        for piece in _slices(text):
            words = _WORD.findall(piece.lower())
            pieces.append(np.fromiter(map(self._hashes.__getitem__, words), np.uint64, len(words)))
            if len(self._hashes) > _CACHED_WORDS:
                self._hashes.clear()
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, np.uint64), *pieces])


class _Hashes(dict[str, int]):
    def __missing__(self, word: str) -> int:
        value = self[word] = xxhash.xxh3_64_intdigest(word.encode())
        return value


def _slices(text: str) -> Iterator[str]:
    """`text` in slices that cut no word (but one of a megabyte)."""
    start = 0
    while len(text) - start > _SLICE:
        gap = _NO_WORD.search(text, start + _SLICE, start + 2 * _SLICE)
        stop = gap.start() if gap else start + 2 * _SLICE
        yield text[start:stop]
        start = stop
    yield text[start:] if start else text


def runs_of_words(words: np.ndarray, length: int) -> np.ndarray:
    """A 64-bit hash of each `length` words in a row: uint64, len(words) - length + 1 of them (none if that is < 1)."""
    return next(runs_of_lengths(words, [length]))


def runs_of_lengths(words: np.ndarray, lengths: Sequence[int]) -> Iterator[np.ndarray]:
    """`runs_of_words` for each of ascending `lengths`.

    Multilinear hashing with odd multipliers, then a finaliser that spreads the bits.
    """
    sums, done = np.zeros(len(words), np.uint64), 0
    multipliers = _multipliers(max(lengths, default=0))
    for length in lengths:
        count = max(0, len(words) - length + 1)
        sums = sums[:count]
        for i in range(done, length):
            sums = sums + words[i : i + count] * multipliers[i]
        done = length
        # The length is in the hash, so that runs of several lengths can lie in one table.
        yield mixed(sums + np.uint64(length))


@lru_cache
def _multipliers(count: int) -> np.ndarray:
    return random_numbers(count, seed=1) | np.uint64(1)


def mixed(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014), a bijection of uint64 in which each bit depends on all."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def random_numbers(count: int, *, seed: int) -> np.ndarray:
    """`count` fixed uint64: splitmix64's stream, and so independent of numpy's generators and their versions."""
    steps = np.arange(1, count + 1, dtype=np.uint64) + np.uint64(seed << 32)
    return mixed(steps * np.uint64(0x9E3779B97F4A7C15))


def content_hash(text: str) -> tuple[int, int]:
    """128 bits of a text as two uint64: equal for texts that differ in white space or Unicode composition only.

    All else counts, also case and punctuation: an exact duplicate is one that nobody would call a variant.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    digest = xxhash.xxh3_128_intdigest(" ".join(text.split()).encode())
    return digest >> 64, digest & (2**64 - 1)
