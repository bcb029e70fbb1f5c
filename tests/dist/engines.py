"""DeepSpeed engines around small modules, for what is tested of DeepSpeed itself and not of this project's stages."""

from __future__ import annotations

import os
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn


@lru_cache
def own_group(*members: tuple[int, ...]) -> dist.ProcessGroup:
    """The group of this rank among `members`. Collective over all ranks, which make all of them, once in their life."""
    groups = [dist.new_group(list(ranks)) for ranks in members]
    return next(group for group, ranks in zip(groups, members, strict=True) if dist.get_rank() in ranks)


def small_engine(
    module: nn.Module,
    *,
    zero: int,
    dp: dist.ProcessGroup,
    replica: dist.ProcessGroup,
    optimizer: torch.optim.Optimizer | None = None,
    dtype: torch.dtype = torch.float32,
    clip: float = 0.0,
    options: dict[str, Any] | None = None,
    zero_options: dict[str, Any] | None = None,
) -> Any:
    """A DeepSpeed engine that partitions `module` over `dp` and takes norms over `replica`; SGD by default."""
    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))  # ZeRO-3 reads it
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    mpu = SimpleNamespace(
        get_data_parallel_group=lambda: dp,
        get_data_parallel_rank=lambda: dist.get_rank(dp),
        get_data_parallel_world_size=lambda: dist.get_world_size(dp),
        get_model_parallel_group=lambda: replica,
        get_model_parallel_rank=lambda: dist.get_rank(replica),
        get_model_parallel_world_size=lambda: dist.get_world_size(replica),
    )
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": zero,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "reduce_bucket_size": 1 << 16,
            "allgather_bucket_size": 1 << 16,
            "stage3_prefetch_bucket_size": 1 << 10,
            "stage3_param_persistence_threshold": 0,
            **(zero_options or {}),
        },
        "steps_per_print": 2**31,
        **(options or {}),
    }
    engine, _, _, _ = deepspeed.initialize(
        model=module,
        optimizer=optimizer or torch.optim.SGD(module.parameters(), lr=0.1),
        config=config,
        mpu=mpu,
        dist_init_required=False,
    )
    return engine
