"""A layout never changes the mathematics: a subset of the matrix with every pair of settings, and what chooses it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from matrix import (
    CROSSED,
    LARGE,
    SMALL,
    case_of,
    choices,
    combined,
    full_matrix,
    pairwise_cover,
    pairwise_subset,
    tuples_of,
)
from parity import Trained, compare, plain, train_and_compare
from small_runs import Case, Held

from llama_dist.boxes import Box
from llama_dist.checkpoint.plan import state_name
from llama_dist.config import fit_layout, micro_batch_of

SUBSET = pairwise_subset()
AT_MOST = 90  # cases in the suite


@pytest.mark.parametrize("case", SUBSET, ids=str)
def test_training_is_that_of_one_plain_process(case: Case) -> None:
    assert all(norm > 1.2 * case.grad_clip for _, norm in plain(case).curve), "clipping must be at work in every step"
    found = train_and_compare(case)
    assert not found.problems, "\n".join(found.problems)


def test_the_subset_has_every_pair_of_settings_that_the_space_has() -> None:
    space = list(choices())
    chosen = pairwise_cover(space)
    everything = tuples_of([*space, *chosen], 2)
    pairs, shown = (set().union(*part) for part in (everything[: len(space)], everything[len(space) :]))
    assert shown == pairs
    assert len(pairs) > 700
    assert len(SUBSET) == len(chosen) <= AT_MOST
    assert {case.layout for case in SUBSET} == {*SMALL, *LARGE}
    assert chosen == pairwise_cover(space), "the same cases each time"


def test_a_cover_has_all_pairs_and_only_what_is_allowed() -> None:
    space = [
        {"a": a, "b": b, "c": c} for a, b, c in itertools.product((1, 2, 3), (1, 2), (False, True)) if a == 1 or not c
    ]
    chosen = pairwise_cover(space)
    assert all(choice in space for choice in chosen)
    assert len(chosen) < len(space)
    for (one, x), (other, y) in itertools.combinations([(k, v) for k in "abc" for v in (1, 2, 3, False, True)], 2):
        held = [choice[one] is x and choice[other] is y for choice in space]
        assert any(held) == any(choice[one] is x and choice[other] is y for choice in chosen)


def test_the_full_matrix_crosses_what_it_says() -> None:
    space = list(choices())
    cases = full_matrix()
    assert len(SMALL) == 15
    assert len(cases) == 38 * 3 * 4 * 3 + 4 * 3 * 4  # 38 of layout, schedule and sequence parallelism
    small = [choice for choice in space if choice["layout"] in SMALL]
    crossed = combined(small, CROSSED)
    assert {case_of(choice) for choice in crossed} <= set(cases)
    assert len(crossed) == len({tuple(choice[name] for name in CROSSED) for choice in small})
    # What is not crossed comes in every combination of three settings.
    everything = tuples_of([*small, *crossed], 3)
    triples, shown = (set().union(*part) for part in (everything[: len(small)], everything[len(small) :]))
    assert shown == triples


def test_every_case_is_the_run_that_its_name_says() -> None:
    for case in full_matrix():
        assert Case.parse(str(case)) == case
        layout = fit_layout(case.run, case.world)
        assert layout == case.layout
        assert micro_batch_of(case.run, layout) == case.micro_batch
    counts = {(case.pp, case.microbatches) for case in SUBSET}
    assert any(count < pp for pp, count in counts), "fewer micro-batches than stages"
    assert any(case.kv_heads < case.tp for case in SUBSET), "key/value heads on several ranks"


@pytest.mark.parametrize("text", ["dp2-xx3", "dp2-", "dp", "dp2-tp2-fulll", "2", "dp2--tp2"])
def test_what_is_no_name_of_a_case_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not part of the name of a case"):
        Case.parse(text)


def truth_on_two_ranks(case: Case) -> list[Trained]:
    """What perfect ranks would know: the first holds everything, the second copies of the embedding's first rows."""
    true = plain(case)
    state = []
    for name, final in true.final.items():
        whole = Box((0,) * final.ndim, final.shape)
        state.append(Held(name, whole, True, final.copy()))
        state += [Held(state_name(m, name), whole, True, array.copy()) for m, array in true.moments[name].items()]
    name = "model.embed_tokens.weight"
    rows = Box((0, 0), (2, case.hidden))
    copies = [Held(name, rows, False, true.final[name][:2].copy())]
    return [Trained(true.curve, held, true.log_probs) for held in (state, copies)]


def changed(number: int, rank: int, by: float) -> Callable[[list[Trained]], None]:
    """Change the last element of what a rank holds."""

    def change(ranks: list[Trained]) -> None:
        flat = ranks[rank].state[number].data.reshape(-1)
        flat[-1] += by * max(float(np.linalg.norm(flat)), 1e-3)

    return change


def other_curve(step: int, which: int, by: float, ranks_changed: slice) -> Callable[[list[Trained]], None]:
    def change(ranks: list[Trained]) -> None:
        curve = [list(row) for row in ranks[0].curve]
        curve[step][which] *= 1 + by
        ranks[ranks_changed] = [replace(r, curve=[tuple(row) for row in curve]) for r in ranks[ranks_changed]]

    return change


def scored_otherwise(ranks: list[Trained]) -> None:
    ranks[1] = replace(ranks[1], log_probs=np.nextafter(ranks[1].log_probs, 0))


def badly_scored(ranks: list[Trained]) -> None:
    ranks[:] = [replace(r, log_probs=r.log_probs + np.float32(2e-5)) for r in ranks]


CHANGES: dict[str, tuple[Callable[[list[Trained]], object], str]] = {
    "loss": (other_curve(1, 0, 4e-6, slice(None)), "step 1: loss is off by"),
    "norm": (other_curve(4, 1, 4e-6, slice(None)), "step 4: norm is off by"),
    "no number": (other_curve(2, 1, np.nan, slice(None)), "step 2: norm is off by nan"),
    "ranks disagree": (other_curve(2, 1, 1e-12, slice(1, 2)), "rank 1 knows another curve"),
    "weight": (changed(0, 0, 2e-5), "embed_tokens.weight: weights is off by"),
    "first moment": (changed(1, 0, 2e-5), "exp_avg of model.embed_tokens.weight: moments is off by"),
    "second moment": (changed(2, 0, 2e-5), "exp_avg_sq of model.embed_tokens.weight: moments is off by"),
    "a copy": (changed(0, 1, 1e-6), "the copies of .* have come apart"),
    "missing": (lambda ranks: ranks[0].state.pop(0), "pieces cover 0 of"),
    "twice": (lambda ranks: ranks[1].state.append(ranks[0].state[0]), "overlap"),
    "unknown": (lambda ranks: ranks[1].state.append(replace(ranks[0].state[0], name="x")), "does not have"),
    "score": (badly_scored, "log_probs is off by"),
    "scores disagree": (scored_otherwise, "rank 1 has other log-probabilities"),
}


def test_the_truth_is_not_off() -> None:
    found = compare(Case(), truth_on_two_ranks(Case()), plain(Case()))
    assert found.problems == []
    assert set(found.largest.values()) == {0.0}


@pytest.mark.parametrize("change", CHANGES)
def test_a_comparison_sees(change: str) -> None:
    """Otherwise parity would show nothing."""
    ranks = truth_on_two_ranks(Case())
    make, expected = CHANGES[change]
    make(ranks)
    found = compare(Case(), ranks, plain(Case()))
    assert any(re.search(expected, problem) for problem in found.problems), found.problems
