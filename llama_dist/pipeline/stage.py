"""Stage: the slice of the model that one pipeline rank holds, with global parameter names."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llama_dist.config import ModelConfig
from llama_dist.layout import split_layers
from llama_dist.model.llama import Llama
from llama_dist.parallel.loss import token_losses

CheckpointMode = str | int  # "none", "full", "selective", or N for every N-th layer


class Stage(nn.Module):
    """One slice of the decoder: the embedding with the first, the norm, head and loss with the last.

    `pp = 1` is a pipeline of one stage that is both.
    """

    def __init__(self, slice_: Llama, *, first: bool, last: bool) -> None:
        super().__init__()
        self.slice = slice_
        self.first = first
        self.last = last

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """Run the slice on token ids (batch, time) if first, else on hidden states (batch, time, hidden).

        Returns hidden states (batch, time, hidden); on the last stage, token losses (batch, time) in float32 where
        `targets` (batch, time) are given, else logits (batch, time, vocabulary).
        """
        y = self.slice(x)
        if self.last and targets is not None:
            return token_losses(y, targets)
        return y

    def logical_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by their name in the whole model, a tied weight once."""
        return dict(self.slice.named_parameters())


def build_stage(
    config: ModelConfig, *, pp: int, pp_rank: int, activation_checkpointing: CheckpointMode = "none"
) -> Stage:
    """Build one stage's modules on the meta device: shapes and names, no memory."""
    first, last = pp_rank == 0, pp_rank == pp - 1
    layers = split_layers(config.num_hidden_layers, stages=pp)[pp_rank]
    with torch.device("meta"):
        slice_ = Llama(config, layers=layers, first=first, last=last)
    checkpoint_(slice_, activation_checkpointing)
    return Stage(slice_, first=first, last=last)


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
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


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
