"""When ZeRO-3's parameters are whole: for as long as a module runs, or through a step.

DeepSpeed decides by a trace of modules that runs forward and backward by turns. A pipeline has several micro-batches in
flight, so that trace is often broken off, and with it what DeepSpeed promises of persistent and reused parameters. Both
ways here hold whatever the order of forwards and backwards, and with recomputation.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

HOLDER = -1  # stands among the numbers of the modules that use a parameter; DeepSpeed's own begin at 0


def gather_options(mode: str, *, largest_layer: int, hidden_size: int) -> dict[str, int]:
    """Keys of DeepSpeed's zero_optimization for parallel.gather = `mode`; `largest_layer` in elements.

    "microbatch": at most about three layers are whole at once, as far as DeepSpeed's prefetching reaches; vectors stay.
    "step": nothing is left to DeepSpeed, see `hold_gathered_`.
    """
    if mode == "step":
        return {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
    return {
        "stage3_param_persistence_threshold": hidden_size,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": largest_layer,
        "stage3_max_live_parameters": 2 * largest_layer,
    }


def hold_gathered_(parameters: Iterable[nn.Parameter]) -> None:
    """Gather ZeRO-3 parameters and keep them whole until the engine's next step. Collective over `dp`.

    A parameter that a module uses is not released; the step clears those marks and partitions everything.
    """
    held = list(parameters)
    held[0].all_gather(held)
    for parameter in held:
        parameter.ds_active_sub_modules.add(HOLDER)


def release_gathered_(optimizer: Any) -> None:
    """Partition all parameters of a ZeRO-3 engine, held or not: what is written to the shares is then gathered anew."""
    optimizer.parameter_offload.partition_all_parameters()


class BackwardCounts:
    """Lets ZeRO-3 release a module's parameters in every backward, with several forwards in flight.

    DeepSpeed releases them once the gradients of all of the module's inputs are there, and counts those down from a
    number that each forward sets: the second backward after two forwards would find nothing left to count, and the
    whole stage would pile up until it ends. `restore_` before each backward sets the number again.
    """

    def __init__(self, module: nn.Module) -> None:
        self._counts: dict[nn.Module, int] = {}
        for part in module.modules():
            part.register_forward_hook(self._remember)

    def _remember(self, module: nn.Module, *_: Any) -> None:
        if torch.is_grad_enabled():
            self._counts[module] = module.ds_grads_remaining

    def restore_(self) -> None:
        for module, count in self._counts.items():
            module.ds_grads_remaining = count
