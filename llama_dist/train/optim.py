"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from llama_dist.config import OptimConfig


def lr_at(optim: OptimConfig, step: int, *, steps: int) -> float:
    """Learning rate of update `step` (from 0) out of `steps`.

    Linear warmup, then "cosine" to `min_lr_ratio * lr` at the end (Loshchilov and Hutter 2017), or "wsd": constant, and
    linear over the last `decay_steps` (Hu et al. 2024, MiniCPM, section 4).
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    floor = optim.min_lr_ratio * optim.lr
    if optim.schedule == "wsd":
        decay = optim.decay_steps or 0
        left = steps - step
        return optim.lr if left > decay else floor + (optim.lr - floor) * left / (decay + 1)
    done = (step - optim.warmup_steps) / max(steps - optim.warmup_steps, 1)
    return floor + (optim.lr - floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
