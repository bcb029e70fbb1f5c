"""What parity rests on: gradients by name, float32 masters of bfloat16, norms that tell NaN, memory while building."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from parity import compare, distance, plain, plain_training, train_and_compare, train_on_rank
from small_runs import (
    Case,
    assemble,
    coordinator_on_rank,
    microbatches_on_rank,
    on_ranks,
    restore_on_rank,
    state_on_rank,
)

from llama_dist.boxes import Box
from llama_dist.pipeline import engine as engine_module
from llama_dist.pipeline.partitions import MOMENTS

SAME = 1e-5  # relative


def test_the_plain_loop_feels_what_is_compared() -> None:
    """Otherwise parity would show nothing: other heads are another curve, and another clipping other moments."""
    base = plain(Case())
    others = [Case(tied=True), Case(kv_heads=1), Case(kv_heads=8), Case(document_mask=True), Case(layers=5)]
    others.append(Case(masked=True))
    for other in others:
        pairs = zip(base.curve, plain(other).curve, strict=True)
        assert any(abs(a - b) / a > 100 * SAME for (a, _), (b, _) in pairs), str(other)
    unclipped = plain_training(Case(grad_clip=100.0))
    for name, moments in base.moments.items():
        assert all(distance(unclipped.moments[name][m], moments[m]) > 0.5 for m in MOMENTS), name
    assert base.curve[-1][0] < base.curve[0][0] - 0.2, "the loss falls"


def gradients_on_rank(case: Case) -> dict[str, tuple[Box, np.ndarray]]:
    """The gradient of each parameter of this rank as the optimizer gets it, and its box of the logical tensor."""
    coordinator = coordinator_on_rank(case)
    restore_on_rank(coordinator)
    stage, engine, seen = coordinator.engine.stage, coordinator.engine.engine, {}

    def look_at_gradients() -> None:
        for name, parameter in stage.logical_parameters().items():
            seen[name] = (stage.slices[name].box, safe_get_full_grad(parameter).float().numpy().copy())

    coordinator.runner.train_step(microbatches_on_rank(coordinator, case, 0))
    engine.step = look_at_gradients  # instead of the update
    with suppress(TypeError):  # there is no norm without an update
        coordinator.engine.apply_gradients(1e-3)
    return seen


GRADIENTS = [
    Case(dp=dp, zero=zero, micro_batch=2, **axes)
    for zero in (1, 2, 3)
    for dp, axes in (
        (1, {}),
        (2, {}),
        (1, {"tp": 2}),
        (1, {"tp": 4, "sequence_parallel": True}),
        (1, {"tp": 2, "cp": 2, "document_mask": True}),
        (2, {"cp": 2, "recompute": "full"}),
        (1, {"pp": 2, "tp": 2, "sequence_parallel": True, "kv_heads": 1, "tied": True}),
        (2, {"pp": 2, "tied": True, "recompute": "selective"}),
        (1, {"pp": 4, "schedule": "zb-h1"}),
        (1, {"pp": 2, "schedule": "interleaved", "virtual_stages": 2, "tied": True}),
    )
]


@pytest.mark.parametrize("case", GRADIENTS, ids=str)
def test_every_gradient_is_autograds(case: Case) -> None:
    expected = plain(case).first_gradients
    covered = {name: np.zeros(gradient.shape, dtype=bool) for name, gradient in expected.items()}
    for gradients in on_ranks(case, gradients_on_rank):
        for name, (box, gradient) in gradients.items():
            assert distance(gradient, expected[name][box.slices]) < SAME, (name, box)
            covered[name][box.slices] = True
    assert all(array.all() for array in covered.values()), "every element of every gradient was seen"


BFLOAT16 = [
    Case(dp=2, zero=1),
    Case(dp=2, zero=2),
    Case(dp=2, zero=3),
    Case(tp=2, zero=2, sequence_parallel=True),
    Case(pp=2, zero=1, schedule="zb-h1"),
    Case(pp=2, dp=2, zero=2, schedule="gpipe"),
    Case(pp=2, tp=2, zero=3, tied=True),
    Case(dp=2, cp=2, zero=3, document_mask=True),
]


@pytest.mark.parametrize("case", BFLOAT16, ids=str)
def test_bfloat16_trains_on_float32_masters(case: Case) -> None:
    expected = plain(case)
    case = replace(case, micro_batch=2, recompute="full", precision="bf16")
    ranks = on_ranks(case, train_on_rank)
    found = compare(case, ranks, expected).largest
    # bfloat16 has 8 bits: what differs is rounding only, and is not nothing.
    assert 1e-6 < found["loss"] < 1e-3
    assert found["norm"] < 2e-2
    assert found["moments"] < 0.1
    # Steps far below bfloat16's resolution of the weights have arrived in the masters.
    assert found["movement"] < 0.1
    for name, arrays in assemble(case, [trained.state for trained in ranks]).items():
        rounded = torch.tensor(arrays["master"]).bfloat16().float().numpy()
        assert not np.array_equal(arrays["master"], rounded), name


MASKED = [
    Case(dp=2, zero=1, masked=True, micro_batch=2),
    Case(dp=2, zero=3, masked=True, document_mask=True, gather="step"),
    Case(tp=2, zero=2, masked=True, sequence_parallel=True),
    Case(cp=2, zero=3, masked=True, document_mask=True, recompute="full"),
    Case(pp=2, zero=3, masked=True, schedule="zb-h1", tied=True),
    Case(dp=2, pp=2, zero=2, masked=True, schedule="gpipe", micro_batch=4),  # fewer micro-batches than stages
    Case(pp=2, cp=2, zero=1, masked=True, schedule="interleaved", virtual_stages=2, micro_batch=2),
]


@pytest.mark.parametrize("case", MASKED, ids=str)
def test_what_does_not_count_is_left_out_wherever_it_is(case: Case) -> None:
    """Also where all that a replica, a micro-batch or a rank of the sequence has does not count."""
    found = train_and_compare(case)
    assert not found.problems, "\n".join(found.problems)


def empty_step_on_rank(case: Case) -> tuple[float, float, bool]:
    coordinator = coordinator_on_rank(case)
    restore_on_rank(coordinator)
    batches = [replace(b, counted=torch.zeros_like(b.counted)) for b in microbatches_on_rank(coordinator, case, 0)]
    loss = coordinator.runner.train_step(batches)
    norm = coordinator.engine.apply_gradients(1e-3)
    return float(loss), norm, all(np.isfinite(held.data).all() for held in state_on_rank(coordinator))


@pytest.mark.parametrize("case", MASKED[1:6:2], ids=str)
def test_a_step_in_which_nothing_counts_has_no_gradient(case: Case) -> None:
    assert on_ranks(case, empty_step_on_rank) == [(0.0, 0.0, True)] * case.world


def spoilt_step_on_rank(case: Case) -> tuple[float, bool]:
    """A step in which the last rank alone gets a gradient of NaN, although every loss is a number."""
    coordinator = coordinator_on_rank(case)
    restore_on_rank(coordinator)
    if coordinator.runtime.rank == case.world - 1:
        norm = next(m for m in coordinator.engine.stage.modules() if hasattr(m, "eps") and hasattr(m, "weight"))
        norm.register_full_backward_hook(lambda module, inputs, outputs: tuple(g * torch.nan for g in inputs))
    coordinator.runner.train_step(microbatches_on_rank(coordinator, case, 0))
    norm = coordinator.engine.apply_gradients(1e-3)
    finite = all(np.isfinite(held.data).all() for held in state_on_rank(coordinator))
    return norm, finite


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("axis", ["dp", "tp", "pp", "cp"])
def test_a_gradient_that_is_no_number_is_known_to_all_ranks(axis: str, zero: int, precision: str) -> None:
    """DeepSpeed's norms have said -1 for NaN; the coordinator looks for what is not finite."""
    case = Case(**{axis: 2}, zero=zero, precision=precision, micro_batch=4)
    for norm, finite in on_ranks(case, spoilt_step_on_rank):
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
    tensors: int


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
        tensors=len(parameters),
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("dp", "tp", "pp", "cp"), [(4, 1, 1, 1), (2, 2, 1, 1), (2, 1, 2, 1), (2, 1, 1, 2)])
def test_zero3_never_holds_more_than_its_share_and_one_module(dp: int, tp: int, pp: int, cp: int, tied: bool) -> None:
    case = Case(dp=dp, tp=tp, pp=pp, cp=cp, zero=3, tied=tied)
    parts = dp * cp
    for built in on_ranks(case, build_on_rank):
        assert built.peak_whole == built.largest_module == case.vocab * case.hidden // tp
        assert built.left_whole == 0
        # Each tensor's shares are of one size, and of a whole number of DeepSpeed's units.
        assert built.total / parts <= built.share < built.total / parts * 1.01 + 4 * built.tensors
        assert built.total > 5 * built.largest_module / pp
