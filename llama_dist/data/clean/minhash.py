"""How alike two texts are, from 480 bytes of each: MinHash signatures and the bands that find candidates.

The similarity of two texts is the Jaccard index of their sets of shingles, five words in a row. A signature holds
the least value of each of 120 random hash functions over the set; two signatures agree in a place with a probability
that is the similarity (Broder 1997, "On the resemblance and containment of documents"). Cut into bands of a few
places, two signatures that share a whole band are candidates; their similarity is then estimated from all places
(the standard error is 0.037 at 0.8), as Lee et al. 2021 ("Deduplicating training data makes language models better")
do with more places and a second measure.

Why not a library: datasketch (2.0) keeps its index in memory or in a Redis server and hashes each shingle in Python;
datatrove (0.10) has the stages on disk, but takes what shares a band for a duplicate without looking, keeps whichever
of a cluster comes first in its own order, and needs an executor with as many tasks as bands. What is left is this.
"""

from __future__ import annotations

import numpy as np

from llama_dist.data.clean.words import mixed, random_numbers, runs_of_words

SHINGLE_WORDS = 5
PLACES = 120  # hash functions, and numbers in a signature
_FOUND = 0.99  # of the pairs that are exactly as alike as the threshold, so many are candidates at least
_BLOCK = 256  # shingles hashed at a time: 120 x 256 x 8 bytes stay in the processor's cache

# h(x) = (a x + b mod 2^64) >> 32 is strongly universal for 32-bit x (Dietzfelbinger 1996).
_A, _B = random_numbers(2 * PLACES, seed=2).reshape(2, PLACES, 1)


def signature_of(words: np.ndarray) -> np.ndarray:
    """uint32 of PLACES. `words` are hashes of words, at least one; of fewer than five the text is one shingle."""
    shingles = runs_of_words(words, min(SHINGLE_WORDS, len(words))) >> np.uint64(32)
    least = np.full(PLACES, 2**64 - 1, np.uint64)
    for start in range(0, len(shingles), _BLOCK):
        hashes = _A * shingles[start : start + _BLOCK]
        hashes += _B
        np.minimum(least, hashes.min(axis=1), out=least)
    return (least >> np.uint64(32)).astype(np.uint32)  # the least of the shifted is the shifted least


def rows_for(similarity: float) -> int:
    """The most places a band may have (fewer false candidates) that still find 99% of pairs of this `similarity`."""
    return max(rows for rows in _row_counts() if chance_found(similarity, rows) >= _FOUND or rows == 1)


def chance_found(similarity: float, rows: int) -> float:
    """The chance that a pair of this `similarity` shares at least one band of `rows` places."""
    return 1 - (1 - similarity**rows) ** (PLACES // rows)


def _row_counts() -> list[int]:
    return [rows for rows in range(1, PLACES + 1) if PLACES % rows == 0]


def bands_of(signatures: np.ndarray, rows: int) -> np.ndarray:
    """A 64-bit hash of each band of each signature: (documents, PLACES) uint32 -> (documents, bands) uint64."""
    bands = PLACES // rows
    places = signatures.reshape(-1, bands, rows).astype(np.uint64)
    multipliers = random_numbers(rows, seed=3) | np.uint64(1)
    # The number of the band is in its hash, so that only the same band of two texts can meet.
    return mixed((places * multipliers).sum(axis=2, dtype=np.uint64) + random_numbers(bands, seed=4))


def estimated_similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The share of places in which signatures agree: (pairs, PLACES) twice -> float64 of pairs."""
    return (first == second).mean(axis=1)
