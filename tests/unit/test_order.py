"""The order of samples: a bijection for every key, exact shares at every prefix, a function of the position alone."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from llama_dist.data.order import key_of, permute, sample_at, shares_of, source_at
from llama_dist.errors import UserError

RECORDED_ORDER = [5, 2, 6, 0, 3, 7, 4, 8, 1, 9]
RECORDED_DIGEST = "428298a31074d9d0"
RECORDED_KEY = 17721720163055277279


@pytest.mark.parametrize("sizes", [range(1, 300), range(300, 3000, 37), (4095, 4096, 4097, 16384, 16385, 100_003)])
def test_every_size_is_permuted(sizes: range | tuple[int, ...]) -> None:
    for n in sizes:
        assert np.array_equal(np.sort(permute(np.arange(n), n, key_of("size", n))), np.arange(n)), n


def test_keys_differ() -> None:
    orders = {permute(np.arange(50), 50, key_of(0, 0, epoch)).tobytes() for epoch in range(200)}
    assert len(orders) == 200
    assert len({key_of(1, 23), key_of(12, 3), key_of("1", 23), key_of(1, 2, 3), key_of(1, 32)}) == 5


def test_any_index_alone_as_in_the_whole() -> None:
    n = 1_000_003
    some = np.array([[0, 7], [999_999, 500_000]])
    assert np.array_equal(permute(some, n, 5), permute(np.arange(n), n, 5)[some])
    assert permute(np.array([10**15]), 10**15 + 1, 9)[0] <= 10**15


def test_the_order_is_the_same_on_every_platform() -> None:
    """Recorded values: another order would change every run that is resumed."""
    assert permute(np.arange(10), 10, 0).tolist() == RECORDED_ORDER
    digest = hashlib.sha256(permute(np.arange(5000), 5000, key_of(3, 1, 4)).astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == RECORDED_DIGEST
    assert key_of(3, 1, 4) == RECORDED_KEY


def test_the_order_looks_random() -> None:
    n = 10_000
    order = permute(np.arange(n), n, key_of("random")).astype(float)
    neighbours = np.corrcoef(order[:-1], order[1:])[0, 1]
    assert abs(neighbours) < 0.05 and abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.05
    assert np.mean(np.abs(np.diff(order))) == pytest.approx(n / 3, rel=0.05)
    first = np.array([permute(np.arange(6), 6, key_of(k)) for k in range(3000)])
    for place in range(6):
        counts = np.bincount(first[:, place], minlength=6)
        assert np.all(np.abs(counts - 500) < 110), f"place {place}: {counts}"


MIXTURES = [[1.0], [2.0], [1, 1], [0.7, 0.3], [0.1, 0.2, 0.7], [5, 3, 1, 1, 7], [1e-3, 1], [0.333, 0.334], [1] * 33]


@pytest.mark.parametrize("weights", MIXTURES, ids=str)
def test_every_prefix_of_a_mixture_has_exact_shares(weights: list[float]) -> None:
    positions = np.arange(5000)
    source, own = source_at(positions, weights=weights)
    share = np.array(weights) / sum(weights)
    for s in range(len(weights)):
        taken = np.cumsum(source == s)
        assert np.max(np.abs(taken - share[s] * (positions + 1))) < 1 + 1e-9
        assert np.array_equal(own[source == s], np.arange(taken[-1])), "a source's own positions are 0, 1, 2, ..."


def test_one_source_is_the_identity() -> None:
    source, own = source_at(np.array([0, 5, 10**12]), weights=[0.37])
    assert source.tolist() == [0, 0, 0] and own.tolist() == [0, 5, 10**12]


def test_far_positions_are_reached_directly() -> None:
    weights = [0.62, 0.28, 0.1]
    far = 10**13
    source, own = source_at(np.arange(far, far + 1000), weights=weights)
    for s, weight in enumerate(weights):
        assert abs(own[source == s][0] - weight * far) < 2


def test_shares_are_exact_or_rounded_finely() -> None:
    assert shares_of([0.1, 0.3]) == [1, 3]
    assert shares_of([2, 4, 6]) == [1, 2, 3]
    odd = [0.123456789, 3.14159265, 1e-9]
    shares = shares_of(odd)
    assert sum(shares) == 65536 and min(shares) == 1
    assert shares[0] / 65536 == pytest.approx(odd[0] / sum(odd), abs=2 / 65536)
    source, _ = source_at(np.arange(65536), weights=odd)
    assert np.bincount(source).tolist() == shares


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_a_weight_must_be_positive(weight: float) -> None:
    with pytest.raises(UserError, match="data.train.1.weight"):
        source_at(np.arange(3), weights=[1, weight])


def test_epochs_go_through_every_sample_in_orders_of_their_own() -> None:
    _, sample = sample_at(np.arange(40 * 5), sizes=[40], weights=[1], seed=0)
    epochs = sample.reshape(5, 40)
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 5
    _, other = sample_at(np.arange(40), sizes=[40], weights=[1], seed=1)
    assert other.tolist() != epochs[0].tolist()


def test_sources_of_a_mixture_are_each_gone_through() -> None:
    positions = np.arange(90)
    source, sample = sample_at(positions, sizes=[30, 10], weights=[2, 1], seed=4)
    assert sorted(sample[source == 0][:30].tolist()) == list(range(30))
    own = sample[source == 1]
    assert [sorted(own[e : e + 10].tolist()) for e in (0, 10, 20)] == [list(range(10))] * 3
    assert np.array_equal(sample_at(positions[50:], sizes=[30, 10], weights=[2, 1], seed=4)[1], sample[50:])
