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


def permute(index: np.ndarray, n: int, key: int | np.ndarray) -> np.ndarray:
    """Where a bijection of range(n) chosen by `key` sends each of `index`: int64, same shape.

    `key` is one for all, or uint64 of the same shape. A balanced Feistel network over the next power of four (Luby and
    Rackoff 1988), walked on from outside range(n) until it falls inside (Black and Rogaway 2002): O(1) memory, and less
    than four steps on average.
    """
    index = np.asarray(index)
    assert n > 0, "an empty range has no permutation"
    assert index.size == 0 or (index.min() >= 0 and index.max() < n), f"an index lies outside of range({n})"
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    keys = np.atleast_1d(np.asarray(key, dtype=np.uint64)).ravel()
    out = _feistel(index.astype(np.uint64).ravel(), half_bits, keys)
    outside = np.flatnonzero(out >= n)
    while outside.size:
        out[outside] = _feistel(out[outside], half_bits, keys if len(keys) == 1 else keys[outside])
        outside = outside[out[outside] >= n]
    return out.astype(np.int64).reshape(index.shape)


def key_of(*parts: int | str) -> int:
    """A 64-bit key that differs whenever any of `parts` does."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def sample_at(
    positions: np.ndarray, *, sizes: Sequence[int], weights: Sequence[float], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which sample stands at each of `positions` of a mixture that does not change: (source, sample of that source).

    Both int64. `sizes[s]` is the number of samples of source `s`.
    """
    source, own = source_at(positions, weights=weights)
    sample = np.empty_like(own)
    for s in np.unique(source):
        chosen = source == s
        sample[chosen] = shuffled(own[chosen], sizes[s], seed=seed, number=int(s))
    return source, sample


def shuffled(own: np.ndarray, size: int, *, seed: int, number: int) -> np.ndarray:
    """Which of a source's `size` samples stands at each of its own positions: once an epoch, in that epoch's own order.

    int64, same shape. `number` is the source's in the run.
    """
    own = np.asarray(own, dtype=np.int64)
    epoch, within = np.divmod(own, size)
    epochs, which = np.unique(epoch, return_inverse=True)
    keys = np.array([key_of(seed, number, e) for e in epochs.tolist()], dtype=np.uint64)
    # All epochs at once: a small source may go through many of them in a few steps.
    return permute(within, size, int(keys[0]) if len(keys) == 1 else keys[which.reshape(own.shape)])


def source_at(positions: np.ndarray, *, weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The mixture: each position's (source, position within that source), both int64.

    After any number of positions each source has had its share to less than one sample. Shares are exact where the
    weights are multiples of a fraction down to 1/65536 of their sum, and are otherwise rounded to such multiples.
    """
    table, rank, counts = _period(tuple(weights))
    period, within = np.divmod(np.asarray(positions, dtype=np.int64), len(table))
    source = table[within]
    return source, period * counts[source] + rank[within]


def taken_by(n: int, *, weights: Sequence[float]) -> list[int]:
    """How many of the first `n` positions of a mixture are each source's."""
    table, _, counts = _period(tuple(weights))
    period, within = divmod(n, len(table))
    begun = np.bincount(table[:within], minlength=len(counts))
    return [period * int(count) + int(more) for count, more in zip(counts, begun, strict=True)]


def position_of(own: int, *, source: int, weights: Sequence[float]) -> int:
    """Where in a mixture a source's sample number `own` stands: the inverse of `source_at`."""
    table, _, counts = _period(tuple(weights))
    period, rank = divmod(own, int(counts[source]))
    return period * len(table) + int(_slots(tuple(weights), source)[rank])


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
    counts = np.array(shares_of(weights), dtype=np.int64)
    length = int(counts.sum())
    source = np.repeat(np.arange(len(counts)), counts)
    rank = np.arange(length) - np.repeat(np.cumsum(counts) - counts, counts)
    release, deadline = rank * length // counts[source], -(-(rank + 1) * length // counts[source])
    by_deadline = np.argsort(deadline, kind="stable")  # of equal ones the first source is first
    urgency = np.empty(length, dtype=np.int64)  # a job's place in the order of deadlines
    urgency[by_deadline] = np.arange(length)
    released = urgency[np.argsort(release, kind="stable")].tolist()
    until = np.cumsum(np.bincount(release, minlength=length)).tolist()
    ready: list[int] = []
    served = []
    at = 0
    for end in until:
        for job in released[at:end]:
            heapq.heappush(ready, job)
        at = end
        served.append(heapq.heappop(ready))
    order = by_deadline[served]
    assert np.all(np.arange(length) < deadline[order]), "earliest deadline first missed a deadline"
    return source[order], rank[order], counts


@lru_cache(maxsize=64)
def _slots(weights: tuple[float, ...], source: int) -> np.ndarray:
    """The slots of a source in a period, rising."""
    return np.flatnonzero(_period(weights)[0] == source)


def _feistel(x: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
    """A bijection of range(4 ** half_bits) for each key; `keys` has one, or one for each of `x`."""
    bits = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    left, right = x >> bits, x & mask
    for r in range(1, ROUNDS + 1):
        mixed = _mix_(right + (keys + np.uint64(r * 0x9E3779B97F4A7C15 & MASK)))
        mixed &= mask
        mixed ^= left
        left, right = right, mixed
    return (left << bits) | right


def _mix_(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64, in place: every bit of the input reaches every bit of the output."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x ^= x >> np.uint64(shift)
        x *= np.uint64(factor)
    x ^= x >> np.uint64(31)
    return x
