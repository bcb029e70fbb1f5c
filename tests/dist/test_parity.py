"""The layout never changes the mathematics: every ZeRO stage and world size gives the curve of one plain process."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from small_runs import (
    GLOBAL_BATCH,
    MODEL,
    SEQ_LEN,
    STEPS,
    Case,
    Shares,
    assemble,
    coordinator_on_rank,
    microbatches_on_rank,
    restore_on_rank,
    state_on_rank,
    steps_on_rank,
    tokens_at,
)
from torch.nn import functional as F
from workers import pool

from llama_dist.checkpoint.store import Position
from llama_dist.model.init import init_
from llama_dist.model.llama import Llama
from llama_dist.pipeline import engine as engine_module
from llama_dist.pipeline.partitions import MOMENTS
from llama_dist.train.optim import lr_at

TRAINED = 5  # optimizer steps that are compared
SAME = 1e-5  # relative


@dataclass(frozen=True)
class Plain:
    """What one process without any parallel code computes."""

    curve: list[tuple[float, float]]
    first: dict[str, np.ndarray]
    final: dict[str, np.ndarray]
    moments: dict[str, dict[str, np.ndarray]]
    first_gradients: dict[str, np.ndarray]


def plain_training(case: Case) -> Plain:
    """A loop that anybody would write in plain PyTorch: whole batch, autograd, clip_grad_norm_, AdamW."""
    run = case.run
    model = Llama(run.model)
    init_(model, run.model, run.train.seed)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": run.optim.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=run.optim.lr, betas=run.optim.betas, eps=run.optim.eps, foreach=False)
    first, curve, gradients = arrays_of(model), [], {}
    for step in range(TRAINED):
        tokens = tokens_at(step)
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        gradients = gradients or {name: p.grad.numpy().copy() for name, p in model.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), case.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(run.optim, step, steps=STEPS)
        optimizer.step()
        curve.append((loss.item(), norm.item()))
    moments = {
        name: {moment: optimizer.state[p][moment].numpy().copy() for moment in MOMENTS}
        for name, p in model.named_parameters()
    }
    return Plain(curve, first, arrays_of(model), moments, gradients)


def arrays_of(model: Llama) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


@lru_cache
def plain(tied: bool, kv_heads: int) -> Plain:
    return plain_training(Case(tied=tied, kv_heads=kv_heads))


def train_on_rank(case: Case) -> tuple[list[tuple[float, float]], Shares]:
    coordinator = coordinator_on_rank(case)
    restore_on_rank(coordinator)
    return steps_on_rank(coordinator, case, Position(), TRAINED), state_on_rank(coordinator)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """How far apart two arrays are, relative to the second."""
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b.astype(np.float64)))


EVERY_LAYOUT = [(dp, Case(zero=zero)) for dp in (1, 2, 4) for zero in (1, 2, 3)]
VARIANTS = [
    (1, Case(zero=3, micro_batch=2, recompute="full")),
    (1, Case(zero=1, micro_batch=4, tied=True)),
    (2, Case(zero=1, micro_batch=2, recompute="full")),
    (2, Case(zero=2, micro_batch=2, recompute="selective")),
    (2, Case(zero=3, micro_batch=2, recompute="full")),
    (2, Case(zero=3, micro_batch=2, recompute="selective")),
    (2, Case(zero=3, micro_batch=1, recompute=2)),
    (2, Case(zero=1, tied=True)),
    (2, Case(zero=2, tied=True, recompute="full")),
    (2, Case(zero=3, tied=True, recompute="full")),
    (2, Case(zero=3, kv_heads=4)),
    (2, Case(zero=2, kv_heads=1)),
    (4, Case(zero=3, micro_batch=2, kv_heads=1, tied=True, recompute=2)),
    (4, Case(zero=1, micro_batch=2, recompute="selective")),
]


@pytest.mark.parametrize(("dp", "case"), EVERY_LAYOUT + VARIANTS, ids=lambda value: str(value))
def test_curve_and_weights_are_those_of_one_plain_process(dp: int, case: Case) -> None:
    expected = plain(case.tied, case.kv_heads)
    assert all(norm > 1.2 * case.grad_clip for _, norm in expected.curve), "clipping must be at work in every step"

    answers = pool(dp).run(train_on_rank, case)
    for curve, _ in answers:
        assert curve == answers[0][0], "all ranks must know the same loss and norm"
    np.testing.assert_allclose(answers[0][0], expected.curve, rtol=SAME)
    state = assemble(case, [shares for _, shares in answers])
    assert state.keys() == expected.final.keys()
    for name, arrays in state.items():
        assert distance(arrays["master"], expected.final[name]) < SAME, name
        # Weights move little in five steps, and AdamW hides a wrong scale: movement and moments must agree too.
        moved = expected.final[name] - expected.first[name]
        assert distance(arrays["master"] - expected.first[name], moved) < 5 * SAME, name
        for moment in MOMENTS:
            assert distance(arrays[moment], expected.moments[name][moment]) < SAME, (name, moment)


def test_the_plain_loop_feels_what_is_compared() -> None:
    """Otherwise parity would show nothing: other heads are another curve, and another clipping other moments."""
    base = plain(False, 2)
    for other in (plain(True, 2), plain(False, 1), plain(False, 4)):
        assert any(abs(a - b) / a > 100 * SAME for (a, _), (b, _) in zip(base.curve, other.curve, strict=True))
    unclipped = plain_training(Case(grad_clip=100.0))
    assert all(distance(unclipped.moments[name][m], base.moments[name][m]) > 0.5 for name in base.final for m in MOMENTS)
    assert base.curve[-1][0] < base.curve[0][0] - 0.5, "the loss falls"


def gradients_on_rank(case: Case) -> dict[str, np.ndarray]:
    coordinator = coordinator_on_rank(case)
    restore_on_rank(coordinator)
    coordinator.runner.train_step(microbatches_on_rank(case, 0))
    named = coordinator.engine.stage.logical_parameters()
    return {name: safe_get_full_grad(parameter).float().numpy().copy() for name, parameter in named.items()}


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("dp", [1, 2])
def test_every_gradient_is_autograds(dp: int, zero: int) -> None:
    expected = plain(False, 2).first_gradients
    for gradients in pool(dp).run(gradients_on_rank, Case(zero=zero, micro_batch=2)):
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert distance(gradient, expected[name]) < SAME, name


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_bfloat16_trains_on_float32_masters(zero: int) -> None:
    expected = plain(False, 2)
    case = Case(zero=zero, micro_batch=2, recompute="full", precision="bf16")
    answers = pool(2).run(train_on_rank, case)
    losses = np.array(answers[0][0])[:, 0]
    exact = np.array(expected.curve)[:, 0]
    # bfloat16 has 8 bits: the losses differ by rounding only, and not by nothing.
    assert 1e-6 < np.abs(losses / exact - 1).max() < 5e-3
    for name, arrays in assemble(case, [shares for _, shares in answers]).items():
        assert arrays["master"].dtype == np.float32
        # Steps far below bfloat16's resolution of the weights have arrived in the masters.
        moved = expected.final[name] - expected.first[name]
        assert distance(arrays["master"] - expected.first[name], moved) < 0.3, name
        assert (arrays["master"].astype(np.float64) != torch.tensor(arrays["master"]).bfloat16().double().numpy()).any()


def spoilt_step_on_rank(case: Case) -> tuple[float, bool]:
    """A step in which rank 1 alone gets a gradient of NaN, although every loss is a number."""
    coordinator = coordinator_on_rank(case)
    restore_on_rank(coordinator)
    if coordinator.runtime.rank == 1:
        coordinator.engine.stage.slice.model.norm.register_full_backward_hook(
            lambda module, inputs, outputs: tuple(gradient * torch.nan for gradient in inputs)
        )
    coordinator.runner.train_step(microbatches_on_rank(case, 0))
    norm = coordinator.engine.apply_gradients(1e-3)
    finite = all(np.isfinite(arrays["master"]).all() for *_, arrays in state_on_rank(coordinator))
    return norm, finite


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_gradient_that_is_no_number_is_known_to_all_ranks(zero: int, precision: str) -> None:
    """DeepSpeed's norms have said -1 for NaN; the coordinator looks for what is not finite."""
    for norm, finite in pool(2).run(spoilt_step_on_rank, Case(zero=zero, precision=precision)):
        assert not np.isfinite(norm)
        assert finite, "the update is not made"


@dataclass(frozen=True)
class Built:
    """Elements that a rank held while and after it built its stage."""

    peak_whole: int
    left_whole: int
    share: int
    largest_module: int
    total: int


def build_on_rank(case: Case) -> Built:
    whole: list[int] = []
    real = engine_module.materialise_module_

    def watched(module: torch.nn.Module, **kwargs: Any) -> None:
        real(module, **kwargs)
        whole.append(sum(p.numel() for p in kwargs["made"].values()))

    engine_module.materialise_module_ = watched
    try:
        coordinator = coordinator_on_rank(case)
    finally:
        engine_module.materialise_module_ = real
    parameters = list(coordinator.engine.stage.parameters())
    modules = [sum(p.ds_numel for p in m.parameters(recurse=False)) for m in coordinator.engine.stage.modules()]
    return Built(
        peak_whole=max(whole),
        left_whole=sum(p.numel() for p in parameters),
        share=sum(p.ds_tensor.numel() for p in parameters),
        largest_module=max(modules),
        total=sum(p.ds_numel for p in parameters),
    )


@pytest.mark.parametrize("tied", [False, True])
def test_zero3_never_holds_more_than_its_share_and_one_module(tied: bool) -> None:
    for built in pool(4).run(build_on_rank, Case(zero=3, tied=tied)):
        assert built.peak_whole == built.largest_module == MODEL["vocab_size"] * MODEL["hidden_size"]
        assert built.left_whole == 0
        assert built.total / 4 <= built.share < built.total / 4 * 1.01 + 4 * 3 * 9
        assert built.total > 5 * built.largest_module


def test_the_cases_accumulate_over_several_microbatches() -> None:
    counts = {(dp, GLOBAL_BATCH // (dp * case.micro_batch)) for dp, case in EVERY_LAYOUT + VARIANTS}
    assert {(1, 8), (2, 4), (4, 2), (2, 2), (4, 1)} <= counts
    assert SEQ_LEN <= MODEL["max_position_embeddings"]
