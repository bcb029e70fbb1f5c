"""The learning rate, against values computed by hand."""

from __future__ import annotations

import math

import pytest

from llama_dist.config import OptimConfig
from llama_dist.train.optim import lr_at

COSINE = OptimConfig(lr=1.0, min_lr_ratio=0.1, warmup_steps=10)
WSD = OptimConfig(lr=1.0, min_lr_ratio=0.1, warmup_steps=10, schedule="wsd", decay_steps=20)


@pytest.mark.parametrize("optim", [COSINE, WSD], ids=lambda o: o.schedule)
def test_warmup_rises_in_equal_steps_and_begins_above_zero(optim: OptimConfig) -> None:
    assert [lr_at(optim, step, steps=110) for step in range(10)] == pytest.approx([i / 10 for i in range(1, 11)])


@pytest.mark.parametrize("optim", [COSINE, WSD], ids=lambda o: o.schedule)
def test_after_the_warmup_it_never_rises_and_stays_above_its_floor(optim: OptimConfig) -> None:
    rates = [lr_at(optim, step, steps=110) for step in range(9, 110)]
    assert all(a >= b for a, b in zip(rates, rates[1:], strict=False))
    assert rates[0] == 1.0 and 0.1 < rates[-1] < 0.15


def test_cosine() -> None:
    assert lr_at(COSINE, 10, steps=110) == 1.0
    assert lr_at(COSINE, 60, steps=110) == pytest.approx(0.55)  # halfway: the mean of peak and floor
    assert lr_at(COSINE, 35, steps=110) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert lr_at(COSINE, 110, steps=110) == pytest.approx(0.1)
    assert lr_at(COSINE, 500, steps=110) == pytest.approx(0.1)


def test_wsd_is_constant_and_then_linear_over_its_last_steps() -> None:
    assert {lr_at(WSD, step, steps=110) for step in range(10, 90)} == {1.0}
    decay = [lr_at(WSD, step, steps=110) for step in range(89, 110)]
    falls = [a - b for a, b in zip(decay, decay[1:], strict=False)]
    assert falls == pytest.approx([0.9 / 21] * 20)
    assert decay[-1] == pytest.approx(0.1 + 0.9 / 21)


def test_without_warmup_the_first_step_has_the_peak() -> None:
    assert lr_at(OptimConfig(lr=3e-4), 0, steps=5) == pytest.approx(3e-4)


def test_a_run_that_is_all_warmup() -> None:
    optim = OptimConfig(lr=1.0, warmup_steps=4)
    assert [lr_at(optim, step, steps=4) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert lr_at(optim, 4, steps=4) == 1.0
