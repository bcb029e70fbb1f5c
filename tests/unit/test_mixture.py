"""Mixtures that change: exact shares in every phase, nothing lost or repeated, sources that leave where they must."""

from __future__ import annotations

import itertools
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from llama_dist.config_data import CurriculumStep
from llama_dist.data.history import (
    History,
    Known,
    Pace,
    Present,
    changes_ahead,
    continue_history,
    switch_between,
)
from llama_dist.data.mixture import Mixture, Phase, limit_of, plan
from llama_dist.data.order import position_of, shuffled, source_at, taken_by
from llama_dist.errors import UserError

WEIGHTS = [[1.0], [2, 1], [0.62, 0.28, 0.1], [5, 3, 1, 1, 7], [0.123456, 3.14159, 1e-3], [1] * 17]


def phase(first: int, **weights: float) -> Phase:
    return Phase(first, tuple((int(name[1:]), weight) for name, weight in weights.items()))


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_counts_and_places_are_those_of_the_mixture(weights: list[float]) -> None:
    source, own = source_at(np.arange(3000), weights=weights)
    for n in (0, 1, 2, 17, 499, 2999, 3000):
        assert taken_by(n, weights=weights) == np.bincount(source[:n], minlength=len(weights)).tolist()
    for position in range(0, 3000, 7):
        assert position_of(int(own[position]), source=int(source[position]), weights=weights) == position
    far = 10**15 + 12345
    source, own = source_at(np.array([far]), weights=weights)
    assert position_of(int(own[0]), source=int(source[0]), weights=weights) == far
    assert taken_by(far, weights=weights)[source[0]] == own[0]


def test_shares_are_exact_at_every_prefix_of_every_phase() -> None:
    phases = [phase(0, s0=3, s1=1), phase(1000, s0=0.1, s1=0.2, s2=0.7), phase(1777, s2=1), phase(2500, s0=1, s3=2)]
    mixture = Mixture(phases)
    number, own = mixture.at(np.arange(4000))
    for s in range(4):
        assert np.array_equal(own[number == s], np.arange(np.sum(number == s))), "goes on where it was left"
    for this, after in zip(phases, [*phases[1:], Phase(4000, ())], strict=True):
        here = number[this.first : after.first]
        total = sum(this.ratios)
        for s, weight in this.weights:
            taken = np.cumsum(here == s)
            assert np.max(np.abs(taken - weight / total * np.arange(1, len(here) + 1))) < 1 + 1e-9
        assert set(np.unique(here)) == set(this.numbers)
    for position in (0, 1, 999, 1000, 1001, 2500, 3999):
        taken = mixture.taken(position)
        assert [taken.get(s, 0) for s in range(4)] == np.bincount(number[:position], minlength=4).tolist()
    assert mixture.end is None


def stepped(weights: dict[int, float], limits: dict[int, int], count: int) -> list[tuple[int, int]]:
    """(source, own position) one by one: sources leave behind their last sample, a new mixture of the others begins."""
    taken = dict.fromkeys(weights, 0)
    found: list[tuple[int, int]] = []
    while len(found) < count:
        left = [n for n in weights if taken[n] < limits.get(n, count + 1)]
        if not left:
            return found
        source, _ = source_at(np.arange(count), weights=[weights[n] for n in left])
        for s in source.tolist():
            number = left[s]
            found.append((number, taken[number]))
            taken[number] += 1
            if taken[number] == limits.get(number) or len(found) == count:
                break
    return found


@pytest.mark.parametrize(
    ("weights", "limits"),
    [
        ({0: 3, 1: 1, 2: 1}, {1: 100, 2: 300}),
        ({0: 3, 1: 1, 2: 1}, {0: 10, 1: 11, 2: 12}),
        ({0: 1, 1: 1}, {0: 5, 1: 5}),
        ({0: 0.7, 3: 0.2, 5: 0.1}, {0: 1, 5: 1}),
        ({0: 1}, {0: 7}),
        ({n: 1.5 + n for n in range(9)}, {n: 40 * n + 3 for n in range(9)}),
    ],
)
def test_a_source_leaves_at_the_very_position_of_its_limit(weights: dict[int, float], limits: dict[int, int]) -> None:
    expected = stepped(weights, limits, 2000)
    mixture = plan([], [Phase(0, tuple(weights.items()))], limits)
    assert mixture.end == (len(expected) if len(expected) < 2000 else None)
    number, own = mixture.at(np.arange(len(expected)))
    assert list(zip(number.tolist(), own.tolist(), strict=True)) == expected
    assert len(mixture.phases) <= len(weights) + 1


def test_a_plan_cut_anywhere_and_made_again_is_the_same() -> None:
    ahead = [phase(0, s0=3, s1=1, s2=1), phase(700, s1=2, s2=1)]
    limits = {1: 300, 2: 200}
    whole = plan([], ahead, limits)
    for at in range(1, whole.end or 0, 13):
        rest = [p for p in ahead if p.first > at]
        now = [p for p in ahead if p.first <= at][-1]
        assert plan(whole.phases, [Phase(at, now.weights), *rest], limits).phases == whole.phases
    assert plan([], ahead, limits, until=100).phases == (ahead[0],)


def test_a_trillion_tokens_are_planned_and_reached_at_once() -> None:
    """Sources of 10**12 tokens in samples of 2048, one of them 2.5 times: no array is of their size."""
    size = 10**12 // 2048
    sources = [present("web", 3, size), present("books", 1, size // 4, epochs=2.5), present("code", 0.7, size)]
    tracemalloc.start()
    started_at = time.process_time()
    history, numbers = continue_history(
        None, sources, [curriculum(10**6, web=1, code=1)], now=Pace(0, 0, 2048), steps=10**6 + 9
    )
    mixture = Mixture(history.phases)
    middle = 10**6 * 1024
    number, own = mixture.at(np.arange(middle, middle + 2048))
    for n in np.unique(number).tolist():
        sample = shuffled(own[number == n], sources[n].size or 0, seed=0, number=n)
        assert sample.min() >= 0 and sample.max() < (sources[n].size or 0)
    seconds = time.process_time() - started_at
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 0.5 and peak < 20e6, (seconds, peak)
    assert numbers == [0, 1, 2]
    leaves = next(p for p in history.phases if 1 not in p.numbers)
    assert leaves.first < (10**6 - 1) * 2048
    assert mixture.taken(leaves.first)[1] == size // 4 * 5 // 2
    assert mixture.at(np.array([leaves.first - 1]))[0][0] == 1, "the sample before is its last"


def test_the_permutation_is_even_in_the_sense_of_chi_square() -> None:
    """Places by buckets: 32 x 32 counts of 32 each; the statistic of 31 * 31 free ones has deviation sqrt(2 * 961)."""
    n = 1 << 15
    for number in range(3):
        order = shuffled(np.arange(n), n, seed=9, number=number)
        counts = np.zeros((32, 32))
        np.add.at(counts, (np.arange(n) * 32 // n, order * 32 // n), 1)
        statistic = ((counts - 32) ** 2 / 32).sum()
        assert abs(statistic - 31 * 31) < 5 * np.sqrt(2 * 31 * 31), statistic
        low_bits = np.zeros((16, 16))
        np.add.at(low_bits, (np.arange(n) % 16, order % 16), 1)
        statistic = ((low_bits - n / 256) ** 2 / (n / 256)).sum()
        assert abs(statistic - 15 * 15) < 5 * np.sqrt(2 * 15 * 15), statistic


def test_the_permutation_has_no_autocorrelation() -> None:
    n = 20_011
    order = shuffled(np.arange(n), n, seed=1, number=0).astype(float)
    centred = (order - order.mean()) / order.std()
    spectrum = np.abs(np.fft.rfft(centred, 2 * n)) ** 2
    correlation = np.fft.irfft(spectrum)[1:2000] / n
    assert np.max(np.abs(correlation)) < 5 / np.sqrt(n)
    following = shuffled(np.arange(n, 2 * n), n, seed=1, number=0)
    assert abs(np.corrcoef(order, following)[0, 1]) < 5 / np.sqrt(n), "epochs know nothing of each other"


def test_all_orders_of_a_few_samples_come_up_equally() -> None:
    """All 24 orders of four samples, over 4800 epochs."""
    orders = shuffled(np.arange(4 * 4800), 4, seed=3, number=0).reshape(-1, 4)
    assert np.array_equal(np.sort(orders, axis=1), np.tile(np.arange(4), (4800, 1)))
    counts = Counter(map(tuple, orders.tolist()))
    assert len(counts) == 24
    statistic = sum((count - 200) ** 2 / 200 for count in counts.values())
    assert statistic < 23 + 5 * np.sqrt(2 * 23), statistic


# Histories


def present(
    name: str, weight: float = 1.0, size: int | None = 100, *, epochs: float | None = None, content: str | None = None
) -> Present:
    return Present(Known(name, content or f"content of {name}", {"shards": name}), weight, epochs, size)


def curriculum(step: int, **weights: float) -> CurriculumStep:
    return CurriculumStep(step=step, weights=weights)


def test_nothing_is_lost_or_repeated_over_reshapes_and_switches() -> None:
    """Three changes of batch and layout, two switches of the mixture: each source's own positions stay 0, 1, 2, ..."""
    a, b, c = present("a", 3, 50), present("b", 1, 70), present("c", 2, 31)
    starts = [  # batch, dp, steps, sources
        (24, 1, 11, [a, b]),
        (24, 3, 7, [a, b]),
        (16, 8, 9, [present("b", 2, 70), c]),  # a is taken out, c is new
        (12, 2, 14, [present("b", 2, 70), c]),
        (12, 4, 20, [c, a, present("b", 5, 70)]),  # a is back, in another order
        (6, 3, 30, [c, a, present("b", 5, 70)]),
    ]
    history, step, samples = None, 0, 0
    read: dict[int, list[int]] = {}
    switches = 0
    for batch, dp, steps, sources in starts:
        before = history
        history, numbers = continue_history(history, sources, [], now=Pace(step, samples, batch))
        assert numbers == [{"a": 0, "b": 1, "c": 2}[source.known.name] for source in sources]
        switches += before is not None and switch_between(before, history, samples) is not None
        history = History.from_json(history.to_json())
        for _ in range(steps):
            step += 1
            positions = history.positions_of(step)
            assert (positions.start, positions.stop) == (samples, samples + batch)
            share = batch // dp
            for rank in range(dp):
                mine = np.arange(samples + rank * share, samples + (rank + 1) * share)
                for number, own in zip(*(x.tolist() for x in Mixture(history.phases).at(mine)), strict=True):
                    read.setdefault(number, []).append(own)
            samples += batch
    assert switches == 2
    for number, own in read.items():
        assert own == list(range(len(own)))
        size = (50, 70, 31)[number]
        seen = shuffled(np.array(own), size, seed=0, number=number)
        for epoch in range(len(own) // size):
            assert sorted(seen[epoch * size : (epoch + 1) * size].tolist()) == list(range(size))
    assert sum(map(len, read.values())) == samples
    assert history is not None and [pace.batch for pace in history.paces] == [24, 16, 12, 6]
    for past in range(1, step + 1):
        assert history.positions_of(past).stop - history.positions_of(past).start in (24, 16, 12, 6)


def test_a_history_without_changes_is_one_phase_with_the_numbers_of_the_config() -> None:
    first, numbers = continue_history(None, [present("b", 2), present("a", 1)], [], now=Pace(0, 0, 8))
    assert numbers == [0, 1] and first.phases == (Phase(0, ((0, 2), (1, 1))),) and first.paces == (Pace(0, 0, 8),)
    for step in (5, 9, 10):
        after, numbers = continue_history(first, [present("b", 4), present("a", 2)], [], now=Pace(step, 8 * step, 8))
        assert after == first and switch_between(first, after, 8 * step) is None
    moved, _ = continue_history(first, [present("a"), present("b", 2)], [], now=Pace(5, 40, 8))
    assert moved.phases == first.phases, "the order in the config does not matter"


def test_a_curriculum_lies_ahead_at_the_present_batch() -> None:
    sources = [present("a", 3), present("b", 1)]
    entries = [curriculum(11, a=1, b=1), curriculum(21, b=1)]
    first, _ = continue_history(None, sources, entries, now=Pace(0, 0, 8), steps=100)
    assert [p.first for p in first.phases] == [0, 80, 160]
    assert changes_ahead(first, Pace(0, 0, 8), 100) == [
        "from sample 80 (step 11) on: a 50%, b 50%",
        "from sample 160 (step 21) on: b 100%",
    ]
    # From step 15 on twice as many samples a step: the change behind it stays, that ahead comes at the same step.
    after, _ = continue_history(first, sources, entries, now=Pace(15, 120, 16), steps=100)
    assert [p.first for p in after.phases] == [0, 80, 120 + 5 * 16]
    assert switch_between(first, after, 120) is None
    assert after.positions_of(21) == range(200, 216)
    # Without the curriculum the config's own weights hold again: a switch.
    gone, _ = continue_history(first, sources, [], now=Pace(15, 120, 8), steps=100)
    assert [p.first for p in gone.phases] == [0, 80, 120]
    assert switch_between(first, gone, 120) == "from sample 120 on: a 75%, b 25%; it would have been: a 50%, b 50%"
    at_once, _ = continue_history(None, sources, [curriculum(1, b=1)], now=Pace(0, 0, 8))
    assert at_once.phases == (Phase(0, ((1, 1.0),)),)


def test_epochs_hold_over_the_whole_run_and_may_be_raised() -> None:
    sources = [present("a", 1, 100), present("b", 1, 20, epochs=2.5)]
    first, _ = continue_history(None, sources, [], now=Pace(0, 0, 10), steps=100)
    leaves = first.phases[1].first
    assert Mixture(first.phases).taken(leaves)[1] == 50 and len(first.phases) == 2
    again, _ = continue_history(first, sources, [], now=Pace(20, 200, 10), steps=100)
    assert again.phases == first.phases and switch_between(first, again, 200) is None
    more = [sources[0], present("b", 1, 20, epochs=3)]
    raised, _ = continue_history(first, more, [], now=Pace(20, 200, 10), steps=100)
    assert [p.first for p in raised.phases[:3]] == [0, leaves, 200] and raised.phases[2].numbers == [0, 1]
    assert Mixture(raised.phases).taken(1000)[1] == 60
    assert "it would have been: a 100%" in (switch_between(first, raised, 200) or "")


def test_data_that_ends_too_early_is_refused_with_the_step() -> None:
    sources = [present("a", 1, 30, epochs=1), present("b", 1, 20, epochs=2)]
    with pytest.raises(UserError) as caught:
        continue_history(None, sources, [], now=Pace(0, 0, 8), steps=10)
    text = str(caught.value)
    assert "train.steps=10: the data ends before step 9 is whole, at sample 70 of the run" in text
    assert "a (30 samples), b (40 samples); raise data.train.N.epochs" in text and "train.steps=8" in text
    continue_history(None, sources, [], now=Pace(0, 0, 8), steps=8)
    continue_history(None, sources, [], now=Pace(0, 0, 7), steps=10)
    with pytest.raises(UserError, match="before step 5 is whole, at sample 38 .* by then: a"):
        continue_history(
            None, [sources[0], present("b")], [curriculum(3, a=1)], now=Pace(0, 0, 8), steps=10
        )  # fmt: skip
    with pytest.raises(UserError, match="epochs=0.01 of its 30 samples is less than one; use at least 0.033"):
        limit_of(0.01, 30, where="x")
    assert (limit_of(2.5, 31, where="x"), limit_of(0.1, 30, where="x"), limit_of(None, 3, where="x")) == (77, 3, None)


def test_other_content_under_a_name_is_refused_and_equal_content_is_known_by_any_name() -> None:
    first, _ = continue_history(None, [present("a"), present("b")], [], now=Pace(0, 0, 8))
    now = Pace(5, 40, 8)
    with pytest.raises(UserError, match=r"data.train.1: the content of source 'b' is not what the run has read"):
        continue_history(first, [present("a"), present("b", content="x")], [], now=now)
    renamed, numbers = continue_history(first, [present("z", content="content of b"), present("a")], [], now=now)
    assert numbers == [1, 0] and [known.name for known in renamed.sources] == ["a", "z"]
    assert switch_between(first, renamed, 40) is None
    for swapped in ([present("b", content="content of a")], [present("a"), present("b", content="content of a")]):
        with pytest.raises(UserError, match=r"source 'b' is not .* now, which was 'a'\); .* name the new ones 'a' by"):
            continue_history(first, swapped, [], now=now)
    new, numbers = continue_history(renamed, [present("b", content="y"), present("a")], [], now=now)
    assert numbers == [2, 0] and "b 50%" in (switch_between(renamed, new, 40) or "")


def test_the_same_shards_twice_are_two_sources() -> None:
    twice = [present("a", 1, content="x"), present("a", 1, content="x")]
    first, numbers = continue_history(None, twice, [], now=Pace(0, 0, 8))
    assert numbers == [0, 1] and first.phases[0].numbers == [0, 1]
    assert continue_history(first, twice, [], now=Pace(5, 40, 8)) == (first, [0, 1])
    named = [present("p", 1, content="x"), present("q", 3, content="x")]
    first, _ = continue_history(None, named, [], now=Pace(0, 0, 8))
    assert continue_history(first, named[::-1], [], now=Pace(5, 40, 8)) == (
        History((first.sources[0], first.sources[1]), first.phases, first.paces),
        [1, 0],
    )


def test_steps_before_a_history_are_refused() -> None:
    history = History((), (), (Pace(10, 95, 8),))
    assert history.positions_of(11) == range(95, 103)
    with pytest.raises(UserError, match="step 10: the run's history of batches begins after step 10"):
        history.positions_of(10)


def test_plans_hold_for_every_small_mixture() -> None:
    for weights in itertools.product((1, 2, 5), repeat=3):
        limits = dict(enumerate((4, 9, 11)))
        expected = stepped(dict(enumerate(weights)), limits, 100)
        mixture = plan([], [Phase(0, tuple(enumerate(map(float, weights))))], limits)
        number, own = mixture.at(np.arange(24))
        assert mixture.end == 24 and list(zip(number.tolist(), own.tolist(), strict=True)) == expected
