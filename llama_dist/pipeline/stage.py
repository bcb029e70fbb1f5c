"""Stage: the slices of the model that one pipeline rank holds, with global parameter names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llama_dist.config import ModelConfig
from llama_dist.model.cuts import Slice, slice_of
from llama_dist.model.llama import Cache, Documents, Llama
from llama_dist.parallel.context import UlyssesAttention, split_context_
from llama_dist.parallel.loss import token_losses
from llama_dist.parallel.tensor import TensorParallel, cut_

TIED = "model.embed_tokens.weight"  # the only weight that may be on two stages: the first and, as the head, the last
CheckpointMode = str | int  # "none", "full", "selective", or N for every N-th layer


class Stage(nn.Module):
    """What one pipeline rank computes: one slice of the decoder, or several under virtual stages.

    `chunks` are the slices by their number in model order: the embedding is in the first, the norm and head in the
    last. `pp = 1` is a pipeline of one stage that has both.
    """

    def __init__(
        self, chunks: dict[int, Llama], slices: dict[str, Slice], *, tp: TensorParallel, attentions: Sequence[UlyssesAttention]
    ) -> None:
        super().__init__()
        self.chunks = nn.ModuleDict({str(number): chunk for number, chunk in chunks.items()})
        self.slices = slices  # by logical name: which part of each tensor this rank holds
        self.tp = tp
        self.attentions = attentions

    def forward(
        self,
        x: Tensor,
        targets: Tensor | None = None,
        *,
        chunk: int,
        start: int = 0,
        length: int | None = None,
        documents: Documents | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Run one chunk on token ids (batch, time) if it is the first, else on hidden states (batch, time, hidden).

        `start` and `length` say which positions of the sequence these are; `time` of hidden states is `length` over
        tp under sequence parallelism. Returns hidden states like the ones that come in; on the last chunk, token
        losses (batch, length) in float32 where `targets` (batch, length) are given, else logits (batch, length, this
        rank's part of the vocabulary).
        """
        slice_ = self.chunks[str(chunk)]
        y = slice_(x, start=start, length=length, documents=documents, cache=cache)
        if slice_.last and targets is not None:
            return token_losses(y, targets, self.tp)
        return y

    @property
    def virtual_stages(self) -> int:
        return len(self.chunks)

    @property
    def sequence_parts(self) -> int:
        """Over how many tensor-parallel ranks the positions of hidden states are shared out."""
        return self.tp.size if self.tp.splits_sequence else 1

    @contextmanager
    def whole_sequences(self) -> Iterator[None]:
        """Inside, every rank holds all positions: one new token, as in generation, cannot be shared out."""
        sharing = [self.tp, *self.attentions]
        for one in sharing:
            one.whole_sequence = True
        try:
            yield
        finally:
            for one in sharing:
                one.whole_sequence = False

    def largest_layer(self) -> int:
        """Elements of the decoder layer that has most."""
        layers = [layer for chunk in self.chunks.values() for layer in chunk.model.layers.values()]
        return max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers)

    def logical_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by their name in the whole model, a tied weight once."""
        return {name: p for chunk in self.chunks.values() for name, p in chunk.named_parameters()}


def build_stage(
    config: ModelConfig,
    *,
    layers: Sequence[range],
    pp: int,
    pp_rank: int,
    tp: TensorParallel,
    cp_group: dist.ProcessGroup | None = None,
    cp: int = 1,
    activation_checkpointing: CheckpointMode = "none",
) -> Stage:
    """Build one rank's modules on the meta device: shapes and names, no memory.

    `layers` are the decoder layers of every chunk of the model, in order; chunk c belongs to pipeline rank c % pp.
    """
    chunks, attentions = {}, []
    for number in range(pp_rank, len(layers), pp):
        with torch.device("meta"):
            chunk = Llama(config, layers=layers[number], first=number == 0, last=number == len(layers) - 1)
        cut_(chunk, tp)
        attentions.append(split_context_(chunk, cp_group, cp))
        checkpoint_(chunk, activation_checkpointing)
        chunks[number] = chunk
    _share_tied_(chunks)
    names = {name for chunk in chunks.values() for name, _ in chunk.named_parameters()}
    slices = {name: slice_of(name, config, tp=tp.size, tp_rank=tp.rank) for name in names}
    if TIED in slices and pp_rank > 0:
        # The embedding of the first stage is the one that counts in the norm and is saved.
        slices[TIED] = replace(slices[TIED], owner=False)
    return Stage(chunks, slices, tp=tp, attentions=attentions)


def _share_tied_(chunks: dict[int, Llama]) -> None:
    """Where the first and the last chunk are on one rank, a tied head is the first one's embedding."""
    ends = [chunk for chunk in chunks.values() if hasattr(chunk.model, "embed_tokens")]
    for end in ends[1:]:
        end.model.embed_tokens.weight = end.lm_head.weight = ends[0].model.embed_tokens.weight


def checkpoint_(model: Llama, mode: CheckpointMode) -> None:
    """Recompute activations in the backward pass instead of keeping them (Chen et al. 2016).

    "full": keep only each layer's input. N: the same for every N-th layer. "selective": recompute the attention block
    only, the part whose activations are large for their arithmetic (Korthikanti et al. 2022, section 5).
    """
    if mode == "none":
        return
    every = mode if isinstance(mode, int) else 1
    for number, layer in model.model.layers.items():
        if int(number) % every:
            continue
        block = layer.self_attn if mode == "selective" else layer
        # The forward is wrapped and not the module, so that parameters keep their names and ZeRO-3 its hooks.
        # Nothing in a layer is random.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def materialise_(stage: Stage, *, device: torch.device, dtype: torch.dtype) -> None:
    """Give every meta parameter zeroed memory, one module at a time; a parameter that two modules share stays shared.

    The values come later, by logical name, from the initial draw or from a checkpoint.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in stage.modules():
        materialise_module_(module, device=device, dtype=dtype, made=made)


def materialise_module_(
    module: nn.Module, *, device: torch.device, dtype: torch.dtype, made: dict[nn.Parameter, nn.Parameter]
) -> None:
    """Materialise the parameters that `module` itself holds; `made` maps meta parameters to real ones already made."""
    for name, parameter in module._parameters.items():
        if parameter is None or not parameter.is_meta:
            continue
        if parameter not in made:
            made[parameter] = nn.Parameter(torch.zeros(parameter.shape, dtype=dtype, device=device))
        module._parameters[name] = made[parameter]
