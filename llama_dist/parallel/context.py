"""Context parallelism: ranks hold parts of the sequence and, inside attention, whole sequences of some of the heads.

DeepSpeed-Ulysses (Jacobs et al. 2023): everything but attention works position by position, and attention head by head.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from llama_dist.model.llama import Documents, Llama, causal_attention
from llama_dist.parallel.collectives import all_to_all

HEADS, POSITIONS = 1, 2  # dimensions of (batch, heads, T, head_dim)


class UlyssesAttention:
    """Stands in for `Attention.attend` where rank r of `size` holds the r-th part of the positions.

    `whole_sequence`: while True every rank has all positions, and attends by itself; generation feeds single tokens.
    """

    def __init__(self, group: dist.ProcessGroup | None, size: int) -> None:
        assert size == 1 or group is not None, f"{size} context-parallel ranks without a group of theirs"
        self.group, self.size = group, size
        self.whole_sequence = False

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, documents: Documents | None = None) -> Tensor:
        """(batch, heads, T / size, head_dim) and `documents` of the whole sequence -> the same shape as `query`."""
        if self.whole_sequence:
            return causal_attention(query, key, value, documents)
        # One message for all three: to each rank its query heads, then their key heads, then their value heads.
        heads = [self._by_rank(x) for x in (query, key, value)]
        sent = torch.cat(heads, dim=HEADS + 1).flatten(HEADS, HEADS + 1)
        whole = all_to_all(sent, self.group, split=HEADS, join=POSITIONS)
        own = causal_attention(*whole.split([x.shape[HEADS + 1] for x in heads], dim=HEADS), documents)
        return all_to_all(own, self.group, split=POSITIONS, join=HEADS)

    def _by_rank(self, x: Tensor) -> Tensor:
        """(batch, heads, ...) -> (batch, size, heads of a rank, ...); key/value heads fewer than ranks are repeated."""
        heads = x.shape[HEADS]
        if heads < self.size:
            assert self.size % heads == 0, f"{heads} key/value heads do not spread over {self.size} ranks"
            x = x.repeat_interleave(self.size // heads, dim=HEADS)
        assert x.shape[HEADS] % self.size == 0, f"{heads} heads do not split over {self.size} context-parallel ranks"
        return x.unflatten(HEADS, (self.size, -1))


def split_context_(llama: Llama, group: dist.ProcessGroup | None, size: int) -> UlyssesAttention:
    """Let every layer attend across the ranks of `group`, through the object returned. One rank: nothing changes."""
    attention = UlyssesAttention(group, size)
    if size > 1:
        for layer in llama.model.layers.values():
            layer.self_attn.attend = attention
    return attention
