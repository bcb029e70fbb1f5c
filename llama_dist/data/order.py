"""The order of samples as a pure function of the position in the run: no index to build, to store or to shuffle.

Only integer arithmetic, so that every platform gives the same order.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import gcd, isfinite, lcm

import numpy as np

from llama_dist.errors import UserError

ROUNDS = 8
MAX_PERIOD = 1 << 16
MASK = (1 << 64) - 1


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """Where a bijection of range(n) chosen by `key` sends each of `index`: int64, same shape.

    A balanced Feistel network over the next power of four (Luby and Rackoff 1988), walked on from outside range(n)
    until it falls inside (Black and Rogaway 2002): O(1) memory, and less than four steps on average.
    """
    index = np.asarray(index)
    assert n > 0, "an empty range has no permutation"
    assert index.size == 0 or (index.min() >= 0 and index.max() < n), f"an index lies outside of range({n})"
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    out = _feistel(index.astype(np.uint64).ravel(), half_bits, key)
    outside = np.flatnonzero(out >= n)
    while outside.size:
        out[outside] = _feistel(out[outside], half_bits, key)
        outside = outside[out[outside] >= n]
    return out.astype(np.int64).reshape(index.shape)


def key_of(*parts: int | str) -> int:
    """A 64-bit key that differs whenever any of `parts` does."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def sample_at(
    positions: np.ndarray, *, sizes: Sequence[int], weights: Sequence[float], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which sample stands at each of `positions` of the run: (source, sample of that source), both int64.

    `sizes[s]` is the number of samples of source `s`, gone through once an epoch in an order of that epoch's own.
    """
    source, own = source_at(positions, weights=weights)
    sample = np.empty_like(own)
    for s in np.unique(source):
        chosen = source == s
        epoch, within = np.divmod(own[chosen], sizes[s])
        result = np.empty_like(within)
        for e in np.unique(epoch):
            here = epoch == e
            result[here] = permute(within[here], sizes[s], key_of(seed, int(s), int(e)))
        sample[chosen] = result
    return source, sample


def source_at(positions: np.ndarray, *, weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The mixture: each position's (source, position within that source), both int64.

    After any number of positions each source has had its share to less than one sample. Shares are exact where the
    weights are multiples of a fraction down to 1/65536 of their sum, and are otherwise rounded to such multiples.
    """
    table, rank, counts = _period(tuple(weights))
    period, within = np.divmod(np.asarray(positions, dtype=np.int64), len(table))
    source = table[within]
    return source, period * counts[source] + rank[within]


def shares_of(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the ratio of `weights`, of sum at most MAX_PERIOD, each at least 1."""
    for i, weight in enumerate(weights):
        if not (isfinite(weight) and weight > 0):
            raise UserError(f"data.train.{i}.weight={weight}: a weight must be above 0; leave the source out instead")
    exact = [Fraction(str(weight)) for weight in weights]  # 0.1 is meant as 1/10, not as the nearest float
    scale = lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    total = Fraction(sum(whole))
    common = gcd(*whole)
    if total / common <= MAX_PERIOD:
        return [w // common for w in whole]
    rounded = [max(1, round(w * MAX_PERIOD / total)) for w in whole]
    rounded[rounded.index(max(rounded))] += MAX_PERIOD - sum(rounded)
    return rounded


@lru_cache(maxsize=8)
def _period(weights: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One period of the mixture: the source of each slot, its rank within that source, and the slots of each source.

    The j-th slot of a source with share c of p must lie in [floor(j p / c), ceil((j + 1) p / c)); serving the earliest
    deadline first meets all of them (Baruah et al. 1996, proportionate progress), so no source is ever off by one.
    """
    counts = shares_of(weights)
    length = sum(counts)
    waiting = [(0, s, 0) for s in range(len(counts))]  # (release, source, j)
    ready: list[tuple[int, int, int]] = []  # (deadline, source, j)
    table = np.empty(length, dtype=np.int64)
    rank = np.empty(length, dtype=np.int64)
    for slot in range(length):
        while waiting and waiting[0][0] <= slot:
            _, s, j = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(j + 1) * length // counts[s]), s, j))
        deadline, s, j = heapq.heappop(ready)
        assert slot < deadline, "earliest deadline first missed a deadline"
        table[slot], rank[slot] = s, j
        if j + 1 < counts[s]:
            heapq.heappush(waiting, ((j + 1) * length // counts[s], s, j + 1))
    return table, rank, np.array(counts, dtype=np.int64)


def _feistel(x: np.ndarray, half_bits: int, key: int) -> np.ndarray:
    """A bijection of range(4 ** half_bits)."""
    bits = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    left, right = x >> bits, x & mask
    for r in range(1, ROUNDS + 1):
        round_key = np.uint64((key + r * 0x9E3779B97F4A7C15) & MASK)
        left, right = right, left ^ (_mix(right + round_key) & mask)
    return (left << bits) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: every bit of the input reaches every bit of the output."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
