"""The loss of the head's output, token by token."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target token, in nats.

    `logits` (batch, time, vocabulary) in any float type, `targets` (batch, time) int64; returns (batch, time) float32.
    The softmax runs in float32: in bfloat16 its sum over a large vocabulary loses the small probabilities.
    """
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
