"""PipelineRunner: executes a program of forwards, backwards and transfers on one stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llama_dist.pipeline.engine import StageEngine
from llama_dist.pipeline.schedule import PipelineShape, program
from llama_dist.runtime import Runtime


class PipelineRunner:
    """Runs a stage's part of a step. `pp = 1` is a program without transfers, not another code path."""

    def __init__(self, engine: StageEngine, runtime: Runtime, *, schedule: str) -> None:
        self.engine = engine
        self.runtime = runtime
        self.schedule = schedule

    def train_step(self, microbatches: Sequence[Tensor]) -> Tensor:
        """Accumulate the gradients of one step.

        `microbatches`: this replica's token ids, each (micro_batch, seq_len + 1) int64. The loss of the step is the
        mean over the target tokens of all replicas, so that gradients do not depend on how the batch is cut.
        Returns this rank's part of that loss, a float32 scalar on the device: summed over ranks it is the loss.
        """
        layout, coord = self.runtime.layout, self.runtime.coord
        num_targets = sum(batch[:, 1:].numel() for batch in microbatches) * layout.dp
        actions = program(self.schedule, PipelineShape(layout.pp, len(microbatches)))[coord.pp]
        num_backwards = sum(action.kind == "B" for action in actions)

        loss_sum = torch.zeros((), dtype=torch.float32, device=self.runtime.device)
        losses: dict[int, Tensor] = {}
        for action in actions:
            if action.kind == "F":
                losses[action.microbatch] = loss = self._forward(microbatches[action.microbatch])
                loss_sum += loss.detach()
            else:
                assert action.kind == "B", f"{action}: a pipeline of one stage has no transfers"
                num_backwards -= 1
                # DeepSpeed averages gradients over `dp`; times dp makes that a sum.
                scaled = losses.pop(action.microbatch) * (layout.dp / num_targets)
                self.engine.backward(scaled, is_last=num_backwards == 0)
        return loss_sum / num_targets

    def forward_only(self, tokens: Tensor) -> Tensor:
        """Log-probability of each next token, without gradients.

        `tokens` (batch, time) int64; returns (batch, time - 1) float32 on the device: entry [b, t] is
        log p(tokens[b, t + 1] | tokens[b, : t + 1]). Under ZeRO-3 all ranks must call it equally often.
        """
        tokens = tokens.to(self.runtime.device)
        with self.engine.evaluating():
            return -self.engine.forward(tokens[:, :-1], tokens[:, 1:])

    def _forward(self, batch: Tensor) -> Tensor:
        """The summed token losses of one micro-batch."""
        batch = batch.to(self.runtime.device, non_blocking=True)
        return self.engine.forward(batch[:, :-1], batch[:, 1:]).sum()
