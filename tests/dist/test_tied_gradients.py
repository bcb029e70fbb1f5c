"""A weight that two stages hold: its gradients are summed between them, and the norm counts it once, on every ZeRO."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import own_group, small_engine
from torch import Tensor, nn
from torch.nn import functional as F
from workers import pool

from llama_dist.pipeline.partitions import start_optimizer_state, tied_gradient
from llama_dist.pipeline.zero_patch import compare_traces_within_

VOCAB, WIDTH, MICROBATCHES, STEPS, CLIP = 7, 5, 3, 3, 0.5  # 35 elements: partitions end in padding
CPU = torch.device("cpu")


class First(nn.Module):
    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH, _weight=weights["tied"].clone())
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)
        self.linear.weight.data = weights["first"].clone()

    def forward(self, ids: Tensor) -> Tensor:
        return self.linear(self.embed(ids)).tanh()


class Last(nn.Module):
    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)
        self.linear.weight.data = weights["last"].clone()
        self.embed = nn.Linear(WIDTH, VOCAB, bias=False)  # the head
        self.embed.weight.data = weights["tied"].clone()

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        logits = self.embed(self.norm(self.linear(x)))
        return F.cross_entropy(logits.float(), targets)


def weights() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    shapes = {"tied": (VOCAB, WIDTH), "first": (WIDTH, WIDTH), "last": (WIDTH, WIDTH)}
    # Values that bfloat16 has: DeepSpeed's float32 masters begin as the weights that it was given.
    return {name: torch.randn(shape, generator=draw).bfloat16().float() for name, shape in shapes.items()}


def batch(step: int, dp_rank: int, microbatch: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(100 * step + 10 * dp_rank + microbatch)
    ids = torch.randint(0, VOCAB, (5,), generator=draw)
    return ids[:-1], ids[1:]


def optimizer_of(module: First | Last) -> torch.optim.AdamW:
    """AdamW with the same number of groups on both stages, the tied weight alone in the last."""
    tied = module.embed.weight
    rest = [p for p in module.parameters() if p is not tied]
    return torch.optim.AdamW([{"params": rest}, {"params": [tied]}], lr=0.01, eps=1e-3)


def pipeline_step(engine: Any, step: int, *, first: bool) -> float:
    """All forwards, then all backwards on the first stage; forward, backward by turns on the last. The sum of losses."""
    rank, losses, sent, outputs = dist.get_rank(), 0.0, [], []
    peer = rank + 2 if first else rank - 2

    def backward(scalar: Tensor, microbatch: int) -> None:
        # Two backwards without a forward between them: DeepSpeed would take the second for a part of the first.
        engine.optimizer.clear_backward_seen_flag()
        engine.set_gradient_accumulation_boundary(microbatch == MICROBATCHES - 1)
        engine.backward(scalar, scale_wrt_gas=False)

    if first:
        for m in range(MICROBATCHES):
            outputs.append(engine(batch(step, rank % 2, m)[0]))
            sent.append((dist.isend(kept := outputs[-1].detach().float(), peer), kept))
        for m in range(MICROBATCHES):
            dist.recv(gradient := torch.empty(4, WIDTH), peer)
            backward((outputs[m].float() * gradient).sum(), m)
    else:
        for m in range(MICROBATCHES):
            dist.recv(received := torch.empty(4, WIDTH), peer)
            x = received.to(next(engine.module.parameters()).dtype).requires_grad_()
            loss = engine(x, batch(step, rank % 2, m)[1])
            backward(loss, m)
            sent.append((dist.isend(kept := x.grad.float(), peer), kept))
            losses += loss.item()
    for work, _ in sent:
        work.wait()
    return losses


def train(zero: int, dtype: torch.dtype) -> tuple[list[float], list[float], int]:
    """Losses and norms of each step on this rank of pp2 x dp2, and the elements of the tied gradient that it held."""
    first = dist.get_rank() < 2
    dp, replica = own_group((0, 1), (2, 3)), own_group((0, 2), (1, 3))
    module = (First if first else Last)(weights()).to(dtype)
    for parameter in module.parameters():
        parameter.model_parallel = first or parameter is not module.embed.weight
    options = {"communication_data_type": "fp32"}
    engine = small_engine(
        module, zero=zero, dp=dp, replica=replica, optimizer=optimizer_of(module), dtype=dtype, clip=CLIP,
        options=options,
    )  # fmt: skip
    start_optimizer_state(engine.optimizer)
    if zero == 3:
        compare_traces_within_(engine.optimizer, dp, device=CPU)
    losses, norms = [], []
    for step in range(STEPS):
        losses.append(pipeline_step(engine, step, first=first))
        held = tied_gradient(engine.optimizer, engine.module.embed.weight, zero=zero)
        dist.all_reduce(held, group=replica)
        engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    return losses, norms, held.numel()


def train_alone(dtype: torch.dtype) -> tuple[list[float], list[float]]:
    """The same in one process without DeepSpeed: float32 masters, weights of `dtype`, float32 sums of gradients."""
    master = First(weights()), Last(weights())
    master[1].embed.weight = master[0].embed.weight
    named = {id(p): p for module in master for p in module.parameters()}
    adamw = torch.optim.AdamW(list(named.values()), lr=0.01, eps=1e-3)
    losses, norms = [], []
    for step in range(STEPS):
        total = 0.0
        for dp_rank in range(2):
            for m in range(MICROBATCHES):
                ids, targets = batch(step, dp_rank, m)
                first, last = First(weights()), Last(weights())
                for module, source in zip((first, last), master, strict=True):
                    module.load_state_dict(source.state_dict())
                    module.to(dtype)
                loss = last(first(ids), targets)
                loss.backward()
                total += loss.item()
                for module, source in zip((first, last), master, strict=True):
                    for mine, its in zip(module.parameters(), source.parameters(), strict=True):
                        part = mine.grad.float() / 2
                        its.grad = part if its.grad is None else its.grad + part
        norms.append(nn.utils.clip_grad_norm_(list(named.values()), CLIP).item())
        adamw.step()
        adamw.zero_grad()
        losses.append(total)
    return losses, norms


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_sum_is_the_gradient_of_one_weight(zero: int, dtype: torch.dtype) -> None:
    losses, norms = train_alone(dtype)
    assert min(norms) > CLIP, "nothing is clipped, so this shows nothing of it"
    ranks = pool(4).run(train, zero, dtype)
    for step in range(STEPS):
        assert sum(answer[0][step] for answer in ranks) == pytest.approx(losses[step], rel=2e-6)
        for answer in ranks:
            assert answer[1][step] == pytest.approx(norms[step], rel=2e-6)
    held = [answer[2] for answer in ranks]
    whole = VOCAB * WIDTH
    assert held[:2] == held[2:] and sum(held[:2]) == (2 * whole if (zero, dtype) == (1, torch.bfloat16) else whole)
