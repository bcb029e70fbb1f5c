"""Evaluation on a distributed model: the plain model's log-probabilities, and scores that no layout changes."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from parity import log_probs_of, plain_model
from small_runs import (
    Case,
    coordinator_on_rank,
    on_ranks,
    position_at,
    restore_on_rank,
    state_on_rank,
    steps_on_rank,
    tokens_at,
)
from torch import Tensor

from llama_dist.eval.scoring import PlainScorer, Request, Replica, log_likelihoods

NUM_REQUESTS, BATCH = 13, 3  # 5 batches, the last of one: neither divides by 2 or 4 ranks
LAYOUTS = [
    Case(zero=1),
    Case(dp=2, zero=3),
    Case(dp=4, zero=3),
    Case(tp=2, zero=1),
    Case(tp=4, zero=3, sequence_parallel=True),
    Case(pp=2, zero=1),
    Case(pp=4, zero=3, schedule="zb-h1"),
    Case(pp=2, zero=3, schedule="interleaved", virtual_stages=2, tied=True),
    Case(cp=4, zero=3),
    Case(tp=2, cp=2, zero=1, sequence_parallel=True, kv_heads=1),
    Case(pp=2, cp=2, zero=3, tied=True),
    Case(dp=2, tp=2, zero=3, recompute="full", kv_heads=1),
    Case(tp=2, pp=2, zero=3, sequence_parallel=True, recompute="full"),
    Case(dp=2, tp=2, pp=2, zero=3, sequence_parallel=True),
    Case(cp=2, tp=2, pp=2, zero=1, schedule="interleaved", virtual_stages=2, sequence_parallel=True),
]
SHAPES = [(1, 2), (3, 11), (2, 17), (5, 4), (7, 9)]  # sequences and tokens: odd, fewer than ranks, one to predict


def forward_on_rank(case: Case) -> list[Tensor]:
    coordinator = coordinator_on_rank(case)
    restore_on_rank(coordinator)
    scored = [coordinator.runner.forward_only(tokens_at(case, 0)[:rows, :time]) for rows, time in SHAPES]
    assert not any(log_probs.requires_grad for log_probs in scored)
    return scored


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_forward_only_is_the_plain_models_log_probability(case: Case) -> None:
    model = plain_model(case)
    expected = [log_probs_of(model, tokens_at(case, 0)[:rows, :time]) for rows, time in SHAPES]
    ranks = on_ranks(case, forward_on_rank)
    for scored in ranks:
        for known, first, true in zip(scored, ranks[0], expected, strict=True):
            assert known.dtype == torch.float32
            assert torch.equal(known, first), "every rank knows the same"
            torch.testing.assert_close(known, true, rtol=1e-5, atol=1e-5)


def requests() -> list[Request]:
    """Of unequal lengths, in no order of length, some scored from within."""
    lengths = [3 + (5 * i) % 13 for i in range(NUM_REQUESTS)]
    return [
        Request(tuple(tokens_at(Case(), 20 + i)[i % 8, :n].tolist()), scored_from=1 + i % (n - 1))
        for i, n in enumerate(lengths)
    ]


def scores_on_rank(case: Case) -> list[float]:
    coordinator = coordinator_on_rank(case)
    restore_on_rank(coordinator)
    return log_likelihoods(coordinator.runner, requests(), batch=BATCH, replica=coordinator.replica)


@lru_cache
def scores(case: Case) -> list[float]:
    answers = on_ranks(case, scores_on_rank)
    assert all(answer == answers[0] for answer in answers), "every rank knows all scores"
    assert len(answers[0]) == NUM_REQUESTS
    return answers[0]


@pytest.mark.parametrize("zero", [1, 3])
@pytest.mark.parametrize("dp", [1, 2, 4])
def test_scores_are_the_same_bits_for_any_number_of_replicas(dp: int, zero: int) -> None:
    assert scores(Case(dp=dp, zero=zero)) == scores(Case(zero=1))


@lru_cache
def scores_by_hand(unlaid: Case) -> list[float]:
    """Each request alone, without padding or batching, summed."""
    model, found = plain_model(unlaid), []
    for request in requests():
        log_probs = log_probs_of(model, torch.tensor([request.tokens]))[0]
        found.append(float(log_probs[request.scored_from - 1 :].double().sum()))
    return found


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_scores_are_the_plain_models(case: Case) -> None:
    assert scores(case) == pytest.approx(scores_by_hand(case.unlaid), rel=1e-5)


def test_a_plain_scorer_gives_the_same() -> None:
    plain = PlainScorer(plain_model(Case()), device=torch.device("cpu"))
    found = log_likelihoods(plain, requests(), batch=BATCH, replica=Replica())
    assert found == pytest.approx(scores(Case(zero=1)), rel=1e-6)


def train_on_rank(case: Case, evaluated: bool) -> tuple[object, object]:
    coordinator = coordinator_on_rank(case)
    curve, position = [], restore_on_rank(coordinator)
    for step in range(3):
        curve += steps_on_rank(coordinator, case, position_at(step), 1)
        if evaluated:
            coordinator.runner.forward_only(tokens_at(case, 50 + step)[:2, :9])
    state = [(held.name, held.box, held.data.tobytes()) for held in state_on_rank(coordinator)]
    return curve, (position, state)


@pytest.mark.parametrize(
    "case",
    [
        *(Case(dp=2, zero=zero, recompute="full", micro_batch=2) for zero in (1, 2, 3)),
        Case(tp=2, zero=3, sequence_parallel=True, micro_batch=2),
        Case(pp=2, cp=2, zero=3, gather="step", micro_batch=2),
        Case(tp=2, pp=2, zero=2, schedule="zb-h1", tied=True, micro_batch=2),
    ],
    ids=str,
)
def test_evaluation_between_steps_changes_nothing(case: Case) -> None:
    assert on_ranks(case, train_on_rank, True) == on_ranks(case, train_on_rank, False)
