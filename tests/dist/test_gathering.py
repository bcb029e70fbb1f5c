"""What ZeRO-3 gathers, and how much of it is whole at once, in the orders of micro-batches that pipelines have."""

from __future__ import annotations

from functools import partial

import deepspeed.comm.comm as comm
import pytest
import torch
import torch.distributed as dist
from engines import own_group, small_engine
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from workers import pool

from llama_dist.pipeline.gathering import BackwardCounts, gather_options, hold_gathered_, release_gathered_
from llama_dist.pipeline.partitions import clear_gradients, start_optimizer_state
from llama_dist.pipeline.zero_patch import compare_traces_within_

LAYERS, WIDTH, STEPS = 4, 16, 2
LAYER = 8 * WIDTH * WIDTH
ORDERS = (("FBFBFB", True), ("FFBFBB", False), ("FFFBBB", True), ("FFFBBB", False))  # with and without recomputation


class Net(nn.Module):
    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Tanh(), nn.Linear(4 * WIDTH, WIDTH, bias=False))
            for _ in range(LAYERS)
        )
        self.norm = nn.LayerNorm(WIDTH)
        for layer in self.layers if recompute else ():
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.norm(x)


def batch(step: int, rank: int, microbatch: int) -> Tensor:
    draw = torch.Generator().manual_seed(100 * step + 10 * rank + microbatch)
    return torch.randint(0, 11, (3, 5), generator=draw)


def live(net: nn.Module) -> int:
    """Elements of parameters that are whole on this rank now."""
    return sum(p.ds_numel for p in net.parameters() if p.data.numel() == p.ds_numel)


def train(mode: str, order: str, recompute: bool) -> tuple[list[float], float, int, int]:
    """Norms of the steps, models gathered in the last one, elements whole at its peak and after its last action."""
    torch.manual_seed(0)
    net = Net(recompute)
    total = sum(p.numel() for p in net.parameters())
    dp, alone = own_group((0, 1)), own_group((0,), (1,))
    options = gather_options(mode, largest_layer=LAYER, hidden_size=WIDTH)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    engine = small_engine(net, zero=3, dp=dp, replica=alone, optimizer=optimizer, zero_options=options)
    compare_traces_within_(engine.optimizer, dp, device=torch.device("cpu"))
    start_optimizer_state(engine.optimizer)
    clear_gradients(engine.optimizer, zero=3)
    counts = BackwardCounts(net)
    peaks = [0]
    for part in net.modules():
        part.register_forward_hook(lambda *_: peaks.append(live(net)))
        part.register_full_backward_pre_hook(lambda *_: peaks.append(live(net)))
    norms, gathered = [], [0]
    plain = comm.cdb.all_gather_into_tensor

    def counting(output_tensor: Tensor, *args: object, **named: object) -> object:
        gathered.append(output_tensor.numel())
        return plain(output_tensor, *args, **named)

    comm.cdb.all_gather_into_tensor = counting
    try:
        for step in range(STEPS):
            gathered.clear()
            peaks.clear()
            if mode == "step":
                hold_gathered_(net.parameters())
            outputs, done = [], 0
            for action in order:
                if action == "F":
                    outputs.append(engine(batch(step, dist.get_rank(), len(outputs))))
                    continue
                counts.restore_()
                engine.optimizer.clear_backward_seen_flag()
                engine.set_gradient_accumulation_boundary(done == 2)
                engine.backward(outputs[done].cos().square().mean(), scale_wrt_gas=False)
                done += 1
            left = live(net)
            engine.step()
            clear_gradients(engine.optimizer, zero=3)
            norms.append(float(engine.get_global_grad_norm()))
    finally:
        comm.cdb.all_gather_into_tensor = plain
    return norms, sum(gathered) / total, max(peaks), left


def train_alone() -> list[float]:
    torch.manual_seed(0)
    net = Net(recompute=False)
    adamw = torch.optim.AdamW(net.parameters(), lr=0.01)
    norms = []
    for step in range(STEPS):
        for rank in range(2):
            for m in range(3):
                (net(batch(step, rank, m)).cos().square().mean() / 2).backward()
        norms.append(nn.utils.clip_grad_norm_(net.parameters(), 1e9).item())
        adamw.step()
        adamw.zero_grad()
    return norms


@pytest.mark.parametrize(("order", "recompute"), ORDERS)
def test_a_step_gathers_once(order: str, recompute: bool) -> None:
    norms, models, peak, left = pool(2).run(train, "step", order, recompute)[0]
    assert norms == pytest.approx(train_alone(), rel=2e-6)
    total = sum(p.numel() for p in Net(recompute=False).parameters())
    assert models == pytest.approx(1.0, abs=0.01) and peak == left == total


@pytest.mark.parametrize(("order", "recompute"), ORDERS)
def test_a_microbatch_keeps_few_layers(order: str, recompute: bool) -> None:
    norms, models, peak, left = pool(2).run(train, "microbatch", order, recompute)[0]
    assert norms == pytest.approx(train_alone(), rel=2e-6)
    assert models > 3
    vectors = 2 * WIDTH
    assert peak <= 3 * LAYER + vectors < LAYERS * LAYER
    assert left <= vectors


def write_and_read(mode: str) -> float:
    """The output of a model whose weights were all set to 1/WIDTH through its partitions, after it had been gathered."""
    net = Net(recompute=False)
    dp, alone = own_group((0, 1)), own_group((0,), (1,))
    options = gather_options(mode, largest_layer=LAYER, hidden_size=WIDTH)
    engine = small_engine(net, zero=3, dp=dp, replica=alone, zero_options=options)
    compare_traces_within_(engine.optimizer, dp, device=torch.device("cpu"))
    hold_gathered_(net.parameters())
    engine(batch(0, 0, 0))
    release_gathered_(engine.optimizer)
    for parameter in net.parameters():
        parameter.ds_tensor.fill_(1 / WIDTH)
    with torch.no_grad():
        return engine(batch(0, 0, 0)).std().item()


def test_what_is_released_is_gathered_anew() -> None:
    assert pool(2).run(write_and_read, "step") == [0.0, 0.0]
