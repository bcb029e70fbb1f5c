"""A ZeRO rank's part of the training state as (logical name, flat range, float32 master and moments).

DeepSpeed keeps the state in flat buffers that differ by ZeRO stage; this file turns each into views by logical name,
so that the first draw of the weights, checkpoints and checks read and write the one true copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state
from torch import Tensor, nn

from llama_dist.model.cuts import MOMENTS
from llama_dist.pipeline.gathering import release_gathered_


@dataclass(frozen=True)
class Share:
    """Elements [start, stop) of the row-major tensor `name`, held by this rank and no other of its `dp` group.

    `master`, `exp_avg` and `exp_avg_sq` are 1-D float32 views of `stop - start` elements into the optimizer's buffers.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


def read_shares(
    optimizer: Any, named: dict[str, nn.Parameter], shapes: dict[str, tuple[int, ...]], *, zero: int
) -> list[Share]:
    """The rank's shares in model order; parameters of which it holds nothing are left out."""
    read = _share_of_partition if zero == 3 else _share_of_fragment
    shares = [read(optimizer, name, parameter, shapes[name]) for name, parameter in named.items()]
    return [share for share in shares if share is not None]


def _share_of_partition(optimizer: Any, name: str, parameter: nn.Parameter, shape: tuple[int, ...]) -> Share | None:
    """ZeRO-3 gives every rank an equal flat piece of each parameter, the last one padded."""
    size = parameter.ds_tensor.ds_numel
    start = min(size * torch.distributed.get_rank(parameter.ds_process_group), parameter.ds_numel)
    stop = min(start + size, parameter.ds_numel)
    if start == stop:
        return None
    master = safe_get_local_fp32_param(parameter).detach()
    moments = [safe_get_local_optimizer_state(parameter, key) for key in MOMENTS]
    return Share(name, shape, start, stop, *(state.narrow(0, 0, stop - start) for state in (master, *moments)))


def _share_of_fragment(optimizer: Any, name: str, parameter: nn.Parameter, shape: tuple[int, ...]) -> Share | None:
    """ZeRO-1 and 2 cut the concatenation of a group's parameters, so a rank holds some whole and one or two in part."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    address, held = mapping.lp_fragment_address, mapping.hp_fragment_address
    flat = flat_masters(optimizer)[mapping.param_group_index]
    moments = [optimizer.optimizer.state[flat][key].narrow(0, held.start, held.numel) for key in MOMENTS]
    return Share(name, shape, address.start, address.start + address.numel, mapping.hp_fragment.detach(), *moments)


def flat_masters(optimizer: Any) -> list[Tensor]:
    """The flat float32 buffers that the inner optimizer updates, whichever class DeepSpeed chose.

    Raises RuntimeError, naming the class, when DeepSpeed no longer has the buffers this project knows.
    """
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    raise RuntimeError(
        f"{type(optimizer).__name__} of this DeepSpeed has no flat float32 buffer that llama_dist knows; "
        f"use deepspeed 0.19.8, or teach llama_dist/pipeline/partitions.py the new name"
    )


def tied_gradient(optimizer: Any, parameter: nn.Parameter, *, zero: int) -> Tensor:
    """This rank's part of the step's gradient of `parameter`: 1-D, a view that the update and the norm then read.

    It is reduced over the `dp` group and final between the step's last backward and `step()`. Ranks at the same place
    in `dp` groups of equal size hold the same elements of parameters of equal shape, and may sum their views in place.
    ZeRO-1 and 2 cut the concatenation of a parameter group, so there `parameter` must be alone in its group.
    """
    if zero == 3:
        index, place = _place_in(optimizer.fp16_groups, parameter)
        part = optimizer.averaged_gradients[index][place].view(-1)
        start = min(part.numel() * torch.distributed.get_rank(parameter.ds_process_group), parameter.ds_numel)
        return part.narrow(0, 0, min(part.numel(), parameter.ds_numel - start))
    if hasattr(optimizer, "fp32_groups_gradients"):  # BF16_Optimizer keeps whole gradients on every rank
        index, place = _place_in(optimizer.bf16_groups, parameter)
        return optimizer.fp32_groups_gradients[index][place].view(-1)
    index, _ = _place_in(optimizer.bit16_groups, parameter)
    assert len(optimizer.bit16_groups[index]) == 1, "a tied parameter must have a parameter group of its own"
    gradients = optimizer.averaged_gradients[index]
    held = 0 if parameter._hp_mapping is None else parameter._hp_mapping.lp_fragment_address.numel
    flat = getattr(gradients, "flat_partition", None)  # with float32 gradients of bfloat16 weights
    return (gradients[0].view(-1) if flat is None else flat).narrow(0, 0, held)


def _place_in(groups: Sequence[Sequence[nn.Parameter]], parameter: nn.Parameter) -> tuple[int, int]:
    """Which group holds `parameter`, and at which place."""
    places = ((i, j) for i, group in enumerate(groups) for j, other in enumerate(group) if other is parameter)
    return next(places)


def start_optimizer_state(optimizer: Any) -> None:
    """Zero the step count and moments of AdamW now, so that they can be read and written before the first step."""
    for flat in flat_masters(optimizer):
        optimizer.optimizer.state[flat] = {
            "step": torch.zeros((), dtype=torch.float32, device=flat.device),
            **{key: torch.zeros_like(flat) for key in MOMENTS},
        }


def set_optimizer_step(optimizer: Any, step: int) -> None:
    """Set AdamW's count of updates, from which it computes its bias correction."""
    for flat in flat_masters(optimizer):
        optimizer.optimizer.state[flat]["step"].fill_(step)


def refresh_parameters(optimizer: Any, parameters: Sequence[nn.Parameter], *, zero: int) -> None:
    """Copy the float32 masters into the weights that the forward pass uses. Collective over the `dp` group."""
    if zero < 3:
        optimizer.update_lp_params()
        return
    release_gathered_(optimizer)  # whole copies would outlive the change of what they were gathered from
    for parameter in parameters:
        parameter.ds_tensor.copy_(safe_get_local_fp32_param(parameter).view_as(parameter.ds_tensor))


def clear_gradients(optimizer: Any, *, zero: int) -> None:
    """Begin a step with gradients of zero, to which every backward adds.

    ZeRO-3 otherwise overwrites in the first backward of a step, which loses gradients where that backward does not
    reach all parameters: with several chunks on a rank each backward reaches one of them.
    """
    if zero == 3:
        for partition in gradient_partitions(optimizer).values():
            partition.zero_()
        optimizer.micro_step_id = 1


def gradient_partitions(optimizer: Any) -> dict[int, Tensor]:
    """Of a ZeRO-3 optimizer: this rank's accumulated gradient of each parameter, flat and padded, by its ds_id."""
    return optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
