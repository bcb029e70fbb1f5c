"""Tensor parallelism (Shoeybi et al. 2019): modules of the plain model, swapped for ones that hold a rank's slice.

Matrices come in pairs, the first cut by its outputs and the second by its inputs, so that a pair costs one collective
before and one after. Between pairs every rank has the whole residual stream or, with sequence parallelism
(Korthikanti et al. 2022), its part of the positions.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llama_dist.boxes import Cut
from llama_dist.model.cuts import Slice, cut_of, slice_of
from llama_dist.model.llama import Embedding, Linear, Llama, RMSNorm, rms_norm
from llama_dist.parallel.collectives import (
    gather_sequence,
    reduce_from,
    scale_gradient,
    scatter_sequence,
    sum_gradient,
)


class TensorParallel:
    """A rank's place among the `size` that share every matrix, and the way into and out of the region they share.

    `kv_group`: the ranks that hold the same key/value head; needed where there are more ranks than such heads.
    `whole_sequence`: while True every rank has all positions, as if there were no sequence parallelism; generation
    feeds single tokens.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        *,
        rank: int,
        size: int,
        sequence_parallel: bool = False,
        kv_group: dist.ProcessGroup | None = None,
    ) -> None:
        assert 0 <= rank < size, f"rank {rank} is none of {size} tensor-parallel ranks"
        assert size == 1 or group is not None, f"{size} tensor-parallel ranks without a group of theirs"
        self.group, self.kv_group = group, kv_group
        self.rank, self.size = rank, size
        self.sequence_parallel = sequence_parallel
        self.whole_sequence = False

    @property
    def splits_sequence(self) -> bool:
        """Whether ranks hold different positions outside of the region that they share."""
        return self.sequence_parallel and not self.whole_sequence

    def enter(self, x: Tensor) -> Tensor:
        """What a rank has of the residual stream -> the whole (B, T, hidden), of which each makes its own outputs."""
        return gather_sequence(x, self.group) if self.splits_sequence else sum_gradient(x, self.group)

    def leave(self, x: Tensor) -> Tensor:
        """Each rank's term (B, T, hidden) of a sum -> what the rank has of the sum: (B, T or T / size, hidden)."""
        return scatter_sequence(x, self.group) if self.splits_sequence else reduce_from(x, self.group)


class ColumnLinear(Linear):
    """Rows of a weight: whole inputs, this rank's outputs."""

    def __init__(self, held: Slice, tp: TensorParallel) -> None:
        rows, columns = held.box.shape
        super().__init__(columns, rows)
        self.tp, self.copies = tp, held.copies
        assert self.copies == 1 or tp.kv_group is not None, "more ranks than key/value heads need kv_group"

    def forward(self, x: Tensor) -> Tensor:
        if self.copies == 1:
            return self.multiply(x, self.weight)
        # Ranks with the same slice use its outputs for different query heads. Summing the outputs' gradients gives each
        # of them the whole gradient of the weight; that of the input, summed on entering, would count `copies` times.
        y = self.multiply(scale_gradient(x, 1 / self.copies), self.weight)
        return sum_gradient(y, self.tp.kv_group)


class RowLinear(Linear):
    """Columns of a weight: this rank's inputs, whole outputs, summed over the ranks."""

    def __init__(self, held: Slice, tp: TensorParallel) -> None:
        rows, columns = held.box.shape
        super().__init__(columns, rows)
        self.tp = tp

    def forward(self, x: Tensor) -> Tensor:
        return self.tp.leave(self.multiply(x, self.weight))


class VocabEmbedding(Embedding):
    """Rows of the embedding: ids (B, T) of the whole vocabulary -> (B, T or T / size, hidden)."""

    def __init__(self, held: Slice, tp: TensorParallel) -> None:
        super().__init__(*held.box.shape)
        self.tp, self.first_row = tp, held.box.offset[0]

    def forward(self, ids: Tensor) -> Tensor:
        rows = ids - self.first_row
        foreign = (rows < 0) | (rows >= self.num_embeddings)
        x = self.look_up(rows.masked_fill(foreign, 0), self.weight)
        return self.tp.leave(x.masked_fill(foreign[..., None], 0))


class EnteringNorm(RMSNorm):
    """A norm and the way into the shared region: one collective for all matrices that read its output."""

    def __init__(self, held: Slice, tp: TensorParallel, *, eps: float) -> None:
        super().__init__(*held.box.shape, eps)
        self.tp = tp

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.tp.splits_sequence:  # each rank's gradient is that of its positions only
            weight = sum_gradient(weight, self.tp.group)
        return self.tp.enter(rms_norm(x, weight, self.eps))


def cut_(llama: Llama, tp: TensorParallel) -> None:
    """Swap every module of a model on the meta device for one that holds this rank's slice, by model/cuts.py.

    Parameters keep their names, and a tied head stays tied. With one rank nothing changes.
    """
    if tp.size == 1:
        return
    for path, module in list(llama.named_modules()):
        if "weight" not in module._parameters:
            continue
        name = f"{path}.weight"
        assert module.weight.is_meta, f"{name} has memory already; cut the model while it is on the meta device"
        held = slice_of(name, llama.config, tp=tp.size, tp_rank=tp.rank)
        with torch.device("meta"):
            llama.set_submodule(path, _sliced(module, name, held, tp), strict=True)
    if llama.tied:
        llama.lm_head.weight = llama.model.embed_tokens.weight


def _sliced(module: nn.Module, name: str, held: Slice, tp: TensorParallel) -> nn.Module:
    if isinstance(module, Embedding):
        return VocabEmbedding(held, tp)
    if isinstance(module, RMSNorm):
        return EnteringNorm(held, tp, eps=module.eps)
    assert isinstance(module, Linear), f"{name}: a {type(module).__name__} has no tensor-parallel form"
    return RowLinear(held, tp) if cut_of(name) is Cut.DIM1 else ColumnLinear(held, tp)
