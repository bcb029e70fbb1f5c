"""The loss of the head's output, token by token; a rank has all logits or those of its part of the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from llama_dist.parallel.collectives import gathered
from llama_dist.parallel.tensor import TensorParallel


def token_losses(logits: Tensor, targets: Tensor, tp: TensorParallel | None = None) -> Tensor:
    """Negative log-likelihood of each target token, in nats.

    `logits` (batch, time, vocabulary) in any float type, under `tp` the rank's equal part of the vocabulary; `targets`
    (batch, time) int64, on all ranks the same; returns (batch, time) float32, on all ranks the same.
    The softmax runs in float32: in bfloat16 its sum over a large vocabulary loses the small probabilities.
    """
    if tp is None or tp.size == 1:
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    return _VocabularyLosses.apply(logits, targets, tp.rank, tp.group)


def gather_logits(logits: Tensor, tp: TensorParallel | None = None) -> Tensor:
    """(batch, time, the rank's part of the vocabulary) -> (batch, time, vocabulary) on all ranks; no gradient."""
    if tp is None or tp.size == 1:
        return logits
    return gathered(logits.detach(), tp.group, dim=logits.dim() - 1)


class _VocabularyLosses(Function):
    """Softmax over logits of which each rank has some: what is exchanged is three numbers for each token.

    Exponentials are computed again in the backward: they would be a float32 copy of the logits, kept until then.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, rank: int, group: dist.ProcessGroup) -> Tensor:
        size = logits.shape[-1]
        columns = targets - rank * size
        mine = (columns >= 0) & (columns < size)
        columns = columns.masked_fill(~mine, 0).unsqueeze(-1)

        highest = logits.amax(dim=-1, keepdim=True).float()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        reached = (logits.gather(-1, columns).float() - highest).squeeze(-1).masked_fill(~mine, 0)
        total = torch.sub(logits, highest).exp_().sum(dim=-1)
        sums = torch.stack((total, reached))
        dist.all_reduce(sums, group=group)
        total, reached = sums.unbind(0)

        ctx.save_for_backward(logits, columns, mine, highest, total)
        return total.log() - reached

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        logits, columns, mine, highest, total = ctx.saved_tensors
        # Two steps: the sum of both numbers would round away what tells large logits apart.
        slope = torch.sub(logits, highest).exp_().div_(total.unsqueeze(-1))
        slope.scatter_add_(-1, columns, -mine.float().unsqueeze(-1))
        slope.mul_(gradient.unsqueeze(-1))
        return slope.to(logits.dtype), None, None, None
