"""PipelineRunner: takes steps, scores tokens and generates on any layout, by executing one rank's part of a program."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from llama_dist.config import ModelConfig, RunConfig
from llama_dist.data.loader import Batch
from llama_dist.model.llama import Cache
from llama_dist.model.stages import stage_layers
from llama_dist.parallel.loss import gather_logits
from llama_dist.parallel.tensor import TensorParallel
from llama_dist.pipeline.engine import StageEngine
from llama_dist.pipeline.execution import Execution, Microbatch
from llama_dist.pipeline.schedule import SPLIT_BACKWARD, PipelineShape, program
from llama_dist.pipeline.stage import build_stage
from llama_dist.pipeline.transport import Transport
from llama_dist.runtime import Runtime


def build_runner(run: RunConfig, runtime: Runtime, *, dtype: torch.dtype) -> PipelineRunner:
    """This rank's stage, its engine and what runs it; weights are zero until the engine's shares are filled. Collective.

    `dtype` is what forward and backward compute in.
    """
    coord, layout, groups, parallel = runtime.coord, runtime.layout, runtime.groups, run.parallel
    tp = TensorParallel(
        groups.tp,
        rank=coord.tp,
        size=layout.tp,
        sequence_parallel=parallel.sequence_parallel,
        kv_group=groups.kv,
    )
    layers = stage_layers(
        run.model,
        stages=layout.pp * parallel.virtual_stages,
        seq_len=run.data.seq_len,
        given=parallel.stage_layers,
    )
    stage = build_stage(
        run.model,
        layers=layers,
        pp=layout.pp,
        pp_rank=coord.pp,
        tp=tp,
        cp_group=groups.cp,
        cp=layout.cp,
        activation_checkpointing=parallel.activation_checkpointing,
    )
    engine = StageEngine(stage, run, runtime, dtype=dtype)
    return PipelineRunner(engine, runtime, config=run.model, schedule=parallel.schedule)


class PipelineRunner:
    """Runs a rank's part of a step. `pp = 1` is a program without transfers, not another code path."""

    def __init__(self, engine: StageEngine, runtime: Runtime, *, config: ModelConfig, schedule: str) -> None:
        self.engine = engine
        self.runtime = runtime
        self.config = config
        self.schedule = schedule

    def train_step(self, batches: Sequence[Batch]) -> Tensor:
        """Accumulate the gradients of one step.

        `batches`: this replica's micro-batches, tokens (micro_batch, seq_len + 1) int64 each. The loss of the step is
        the mean over the target tokens of all replicas that count, so that gradients do not depend on how the batch is
        cut; where none counts, loss and gradients are 0.
        Returns this rank's part of that loss, a float32 scalar on the device: summed over ranks it is the loss.
        """
        layout = self.runtime.layout
        microbatches = [self._part(batch) for batch in batches]
        num_targets = self._num_targets(microbatches)
        self.engine.start_step()
        # DeepSpeed averages gradients over the ranks that hold the same parameters; times their number makes it a sum.
        outputs = self._execute(self.schedule, microbatches, loss_weight=layout.dp * layout.cp / num_targets)
        loss = torch.zeros((), dtype=torch.float32, device=self.runtime.device)
        if self.runtime.coord.tp == 0:  # all ranks of a tensor-parallel group know the same losses
            for losses, microbatch in zip(outputs, microbatches, strict=False):  # only the last stage has losses
                counted = microbatch.counted
                loss += (losses if counted is None else losses.masked_fill(~counted, 0)).sum()
        return loss / num_targets

    def forward_only(self, tokens: Tensor) -> Tensor:
        """Log-probability of each next token, without gradients, the same on all ranks of a replica.

        `tokens` (batch, time) int64; returns (batch, time - 1) float32 on the device: entry [b, t] is
        log p(tokens[b, t + 1] | tokens[b, : t + 1]). Collective over the ranks of a replica; under ZeRO-3 over all
        ranks, which must call it equally often.
        """
        layout = self.runtime.layout
        batch, length = len(tokens), tokens.shape[1] - 1
        # On the right, where no scored token can see it; and as many micro-batches as stages whatever the batch, because
        # replicas have batches of different sizes, and under ZeRO-3 must run equally many forwards.
        padded = F.pad(tokens, (0, -length % (layout.cp * self.engine.stage.sequence_parts), 0, -batch % layout.pp))
        microbatches = [self._part(Batch(rows)) for rows in padded.chunk(layout.pp)]
        with self.engine.evaluating():
            outputs = self._execute("forward", microbatches)
        losses = self._from_last(outputs, (len(padded), microbatches[0].tokens.shape[1]))
        everyone = [torch.empty_like(losses) for _ in range(layout.cp)]
        dist.all_gather(everyone, losses, group=self.runtime.groups.cp)
        return -torch.cat(everyone, dim=1)[:batch, :length]

    def logits(self, tokens: Tensor, *, start: int, cache: Cache) -> Tensor:
        """Logits after the last of `tokens` (batch, time): (batch, vocab_size) float32, the same on all ranks.

        `start` and `cache` as in `Llama.forward`; each rank keeps the keys and values of its own layers and heads, and
        ranks that share sequences in training hold them whole here. Collective like `forward_only`.
        """
        microbatch = Microbatch(tokens.to(self.runtime.device), None, start=start, cache=cache)
        with self.engine.evaluating(), self.engine.stage.whole_sequences():
            outputs = self._execute("forward", [microbatch])
        tp = self.engine.stage.tp
        last = [gather_logits(output[:, -1:], tp).float().squeeze(1) for output in outputs]
        return self._from_last(last, (len(tokens), self.config.vocab_size))

    def _num_targets(self, microbatches: Sequence[Microbatch]) -> int | Tensor:
        """How many targets of the step count, over all replicas, and at least 1.

        Where masks say what counts, the ranks that hold the same part of the model add up what each sees of the step:
        one number, that never leaves the device. Without masks every rank knows it.
        """
        layout = self.runtime.layout
        if all(microbatch.counted is None for microbatch in microbatches):
            return sum(microbatch.targets.numel() for microbatch in microbatches) * layout.dp * layout.cp
        assert all(microbatch.counted is not None for microbatch in microbatches), "some micro-batches have no mask"
        total = torch.stack([microbatch.counted.sum() for microbatch in microbatches]).sum()
        dist.all_reduce(total, group=self.runtime.groups.dp)
        return total.clamp_(min=1)

    def _part(self, batch: Batch) -> Microbatch:
        """This rank's positions of a batch: one contiguous part of every sequence for each rank of `cp`."""
        tokens = batch.tokens.to(self.runtime.device, non_blocking=True)
        length = (tokens.shape[1] - 1) // self.runtime.layout.cp
        start = self.runtime.coord.cp * length
        counted = batch.counted
        if counted is not None:
            counted = counted[:, start : start + length].to(self.runtime.device, non_blocking=True)
        return Microbatch(
            tokens[:, start : start + length],
            tokens[:, start + 1 : start + length + 1],
            start=start,
            documents=batch.documents,
            counted=counted,
        )

    def _execute(
        self, schedule: str, microbatches: Sequence[Microbatch], *, loss_weight: float | Tensor | None = None
    ) -> list[Tensor]:
        """The last chunk's outputs in the order of the micro-batches; none on other ranks."""
        coord, layout = self.runtime.coord, self.runtime.layout
        shape = PipelineShape(layout.pp, len(microbatches), self.engine.stage.virtual_stages)
        actions = program(schedule, shape)[coord.pp]
        transport = Transport(
            self.runtime.groups.channels,
            actions,
            shapes=[self._message_shape(microbatch) for microbatch in microbatches],
            dtype=self.engine.dtype,
            device=self.runtime.device,
        )
        execution = Execution(
            self.engine, transport, microbatches, num_chunks=shape.chunks, loss_weight=loss_weight
        )
        execution.run(actions, split_backward=schedule in SPLIT_BACKWARD)
        return [execution.outputs[number] for number in sorted(execution.outputs)]

    def _message_shape(self, microbatch: Microbatch) -> tuple[int, ...]:
        batch, length = microbatch.tokens.shape
        return (batch, length // self.engine.stage.sequence_parts, self.config.hidden_size)

    def _from_last(self, outputs: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
        """What the last stage computed, float32 of `shape`, on every stage of the pipeline."""
        known = torch.cat(list(outputs)) if outputs else torch.empty(shape, device=self.runtime.device)
        dist.broadcast(known, group=self.runtime.groups.pp, group_src=self.runtime.layout.pp - 1)
        return known
