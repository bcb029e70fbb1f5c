"""Deferred gradients through DeepSpeed, on every ZeRO stage, and through tensor-parallel layers, equal autograd's."""

from __future__ import annotations

from typing import Any

import deepspeed.comm.comm as comm
import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from engines import own_group, small_engine
from torch import Tensor
from workers import pool

from llama_dist.config import ModelConfig
from llama_dist.model.llama import Llama
from llama_dist.parallel.tensor import TensorParallel, cut_
from llama_dist.pipeline.deferred import Terms, WeightGradients, hand_over
from llama_dist.pipeline.gathering import BackwardCounts, gather_options, hold_gathered_
from llama_dist.pipeline.partitions import clear_gradients, start_optimizer_state
from llama_dist.pipeline.stage import checkpoint_
from llama_dist.pipeline.zero_patch import compare_traces_within_

# Up to three micro-batches in flight; weights' gradients of one come before, between and after inputs' of others.
ORDER = ("F0", "F1", "B0", "F2", "B1", "W0", "B2", "W1", "W2")
MICROBATCHES, STEPS = 3, 2
WITHIN = {"rtol": 1e-6, "atol": 1e-6}


def small_llama(*, tied: bool, kv_heads: int = 1) -> Llama:
    config = ModelConfig(
        vocab_size=14, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4, head_dim=4,
        num_key_value_heads=kv_heads, max_position_embeddings=8, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(1)
    model = Llama(config)
    for parameter in model.parameters():
        # Values that bfloat16 has: DeepSpeed's float32 masters begin as the weights that it was given.
        parameter.data = torch.randn(parameter.shape).mul(0.3).bfloat16().float()
    return model


def batch(step: int, rank: int, microbatch: int) -> Tensor:
    draw = torch.Generator().manual_seed(100 * step + 10 * rank + microbatch)
    return torch.randint(0, 14, (2, 6), generator=draw)


def score(logits: Tensor) -> Tensor:
    return logits.float().sin().mean()


class Deferred:
    """An engine whose weights get their gradients apart from the backward: the calls in their order."""

    def __init__(self, model: Llama, *, zero: int, gather: str, dtype: torch.dtype) -> None:
        world = dist.get_world_size()
        dp = own_group(tuple(range(world)))
        alone = own_group(*((rank,) for rank in range(world)))
        keys = gather_options(gather, largest_layer=4 * 12 * 20, hidden_size=12)
        self.engine = small_engine(
            model.to(dtype), zero=zero, dp=dp, replica=alone, dtype=dtype, zero_options=keys,
            options={"communication_data_type": "fp32"},
        )  # fmt: skip
        self.model, self.zero, self.gather = model, zero, gather
        if zero == 3:
            compare_traces_within_(self.engine.optimizer, dp, device=torch.device("cpu"))
            self.counts = BackwardCounts(model)
        start_optimizer_state(self.engine.optimizer)
        self.start_step()
        self.weights = WeightGradients()
        self.weights.defer_(model)

    def start_step(self) -> None:
        clear_gradients(self.engine.optimizer, zero=self.zero)

    def forward(self, ids: Tensor) -> Tensor:
        if self.zero == 3 and self.gather == "step":
            hold_gathered_(self.model.parameters())
        return self.model(ids)  # the engine's own forward would take the plain backward for one of its own

    def backward_input(self, y: Tensor) -> Terms:
        if self.zero == 3:
            self.counts.restore_()
        with self.weights.noting() as terms:
            y.backward()
        if self.zero == 3:
            self.engine.optimizer.parameter_offload.release_backward_leftovers()
        return terms

    def backward_weights(self, terms: Terms, *, is_last: bool) -> None:
        optimizer = self.engine.optimizer
        optimizer.clear_backward_seen_flag()
        self.engine.set_gradient_accumulation_boundary(is_last)
        optimizer.backward_prologue()
        optimizer.enter_backward()
        with hand_over(terms) as scalar:
            self.engine.backward(scalar, scale_wrt_gas=False)


def train(zero: int, tied: bool, recompute: str, gather: str, dtype: torch.dtype) -> tuple[list[dict[str, Tensor]], int]:
    """The gradients of each step by name, and how many collectives ran while weights' gradients were computed."""
    model = small_llama(tied=tied)
    checkpoint_(model, recompute)
    deferred = Deferred(model, zero=zero, gather=gather, dtype=dtype)
    found, gathers = [], 0
    plain = comm.cdb.all_gather_into_tensor

    def counting(*args: Any, **named: Any) -> Any:
        nonlocal gathers
        gathers += 1
        return plain(*args, **named)

    for step in range(STEPS):
        outputs, terms = {}, {}
        for kind, m in ORDER:
            if kind == "F":
                outputs[m] = score(deferred.forward(batch(step, dist.get_rank(), int(m))))
            elif kind == "B":
                terms[m] = deferred.backward_input(outputs.pop(m))
            else:
                comm.cdb.all_gather_into_tensor = counting
                deferred.backward_weights(terms.pop(m), is_last=m == "2")
                comm.cdb.all_gather_into_tensor = plain
        if zero == 3 and gather == "microbatch":
            whole = [name for name, p in model.named_parameters() if p.dim() > 1 and p.data.numel() > 0]
            assert not whole, f"still gathered: {whole}"
        found.append({name: safe_get_full_grad(p).clone() for name, p in model.named_parameters()})
        deferred.engine.step()
        deferred.start_step()
    return found, gathers


def train_alone(world: int, tied: bool, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """The same by autograd in one process: float32 masters, weights of `dtype`, gradients summed in float32; SGD."""
    master, found = small_llama(tied=tied), []
    for step in range(STEPS):
        total = {name: torch.zeros_like(p) for name, p in master.named_parameters()}
        for rank in range(world):
            for m in range(MICROBATCHES):
                model = small_llama(tied=tied)
                model.load_state_dict(master.state_dict())
                model.to(dtype)
                score(model(batch(step, rank, m))).backward()
                for name, parameter in model.named_parameters():
                    total[name] += parameter.grad.float() / world
        found.append(total)
        for name, parameter in master.named_parameters():
            parameter.data -= 0.1 * total[name]
    return found


@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize(
    ("zero", "tied", "recompute", "gather"),
    [
        (1, False, "none", "microbatch"),
        (1, True, "full", "microbatch"),
        (2, False, "full", "microbatch"),
        (2, True, "none", "microbatch"),
        (3, False, "none", "microbatch"),
        (3, False, "full", "step"),
        (3, True, "none", "step"),
        (3, True, "full", "microbatch"),
        (3, True, "selective", "microbatch"),
    ],
)
def test_the_gradients_are_autograds(dp: int, zero: int, tied: bool, recompute: str, gather: str) -> None:
    for found, gathers in pool(dp).run(train, zero, tied, recompute, gather, torch.float32):
        assert gathers == 0, "parameters were gathered for gradients that do not need them"
        for expected, got in zip(train_alone(dp, tied, torch.float32), found, strict=True):
            assert expected.keys() == got.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(got[name], gradient, **WITHIN)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_the_gradients_of_bfloat16_weights_are_autograds(zero: int) -> None:
    for found, _ in pool(2).run(train, zero, True, "none", "microbatch", torch.bfloat16):
        for expected, got in zip(train_alone(2, True, torch.bfloat16), found, strict=True):
            for name, gradient in expected.items():
                torch.testing.assert_close(got[name], gradient, **WITHIN)


def tensor_parallel(sequence_parallel: bool, tied: bool, recompute: str) -> list[str]:
    """Names of the weights whose deferred gradients on this rank of tp2 are not those of the plain backward."""
    group = own_group((0, 1))
    found: list[dict[str, Tensor]] = []
    for defers in (False, True):
        with torch.device("meta"):
            model = Llama(small_llama(tied=tied).config)
        place = TensorParallel(
            group, rank=dist.get_rank(), size=2, sequence_parallel=sequence_parallel, kv_group=group
        )
        cut_(model, place)
        model.to_empty(device="cpu")
        draw = torch.Generator().manual_seed(dist.get_rank())
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.3
        checkpoint_(model, recompute)
        weights = WeightGradients()
        if defers:
            weights.defer_(model)
        losses = [score(model(batch(0, 0, m), length=6)) for m in range(2)]
        kept = []
        for loss in losses:
            if not defers:
                loss.backward()
                continue
            with weights.noting() as terms:
                loss.backward()
            kept.append(terms)
        for terms in kept:
            with hand_over(terms) as scalar:
                scalar.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    plain, deferred = found
    assert plain.keys() == deferred.keys()
    return [name for name in plain if not torch.allclose(plain[name], deferred[name], **WITHIN)]


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(("tied", "recompute"), [(False, "none"), (True, "full")])
def test_tensor_parallel_layers_defer_too(sequence_parallel: bool, tied: bool, recompute: str) -> None:
    assert pool(2).run(tensor_parallel, sequence_parallel, tied, recompute) == [[], []]
