"""The training loop."""

from __future__ import annotations

from llama_dist.checkpoint.store import Position
from llama_dist.config import RunConfig
from llama_dist.data.prefetch import Prefetching
from llama_dist.pipeline.engine import StageEngine
from llama_dist.pipeline.runner import PipelineRunner
from llama_dist.train.coordinator import Coordinator
from llama_dist.train.optim import lr_at


def train(
    run: RunConfig,
    *,
    engine: StageEngine,
    runner: PipelineRunner,
    loader: Prefetching,
    coordinator: Coordinator,
    position: Position,
) -> Position:
    """Train from `position` to the configured number of steps, or to a request to stop; returns where it ended.

    Every rank runs the same lines; what differs between steps is agreed in `coordinator.decide`.
    """
    coordinator.start_clock()
    while position.step < run.train.steps:
        lr = lr_at(run.optim, position.step, steps=run.train.steps)
        loss_part = runner.train_step(loader.microbatches(position.samples))
        coordinator.saves.before_update()
        grad_norm = engine.apply_gradients(lr)
        position = position.next(run.train.global_batch)

        decision = coordinator.decide(position, loss_part, grad_norm)  # the only control collective of a step
        coordinator.record(position, loss=decision.loss, grad_norm=grad_norm, lr=lr)
        if decision.save or decision.save_local:
            last = decision.stop or position.step >= run.train.steps
            coordinator.save(position, last=last, local=decision.save_local)
        if decision.evaluate:
            coordinator.evaluate(position)
        if decision.stop:
            break
    coordinator.saves.finish()
    return position
