"""StageEngine: a Stage in its own DeepSpeed engine, over the stage's own data-parallel group."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster
from torch import Tensor

from llama_dist.config import OptimConfig, RunConfig
from llama_dist.pipeline.partitions import (
    Share,
    read_shares,
    refresh_parameters,
    set_optimizer_step,
    start_optimizer_state,
)
from llama_dist.pipeline.stage import Stage, materialise_, materialise_module_
from llama_dist.runtime import Groups, Runtime, backend_of

MAX_BUCKET = 200_000_000  # elements; DeepSpeed's own default of 5e8 costs 2 GB of float32 on every rank


class Mpu:
    """What DeepSpeed asks about model parallelism: it partitions over `dp` and sums norms over a whole replica."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.dp

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._groups.dp)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._groups.dp)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.replica

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self._groups.replica)

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self._groups.replica)


class StageEngine:
    """Forward, backward and update of one stage under ZeRO 1, 2 or 3.

    The caller owns gradient accumulation: it names the last backward of a step, and applies the gradients once.
    """

    def __init__(self, stage: Stage, run: RunConfig, runtime: Runtime, *, dtype: torch.dtype) -> None:
        """Give the meta stage memory (ZeRO-3: a rank's share of it) and start its engine. Collective over `dp`.

        Weights are zero until `shares` have been written and `refresh` called.
        """
        prepare_deepspeed(runtime)
        self.stage = stage
        self.dtype = dtype
        self.zero = run.parallel.zero
        self.shapes = {name: tuple(p.shape) for name, p in stage.logical_parameters().items()}
        config = deepspeed_config(run, dtype=dtype, device=runtime.device, numel=num_elements(stage))
        mpu = Mpu(runtime.groups)
        if self.zero == 3:
            partition_(stage, config, mpu, runtime, dtype=dtype)
        else:
            materialise_(stage, device=runtime.device, dtype=dtype)
        # DeepSpeed counts a parameter into the global gradient norm where it is marked, or on model-parallel rank 0
        # only; every stage holds parameters that no other holds, so each must be counted.
        for parameter in stage.parameters():
            parameter.model_parallel = True
        optimizer = build_optimizer(stage, self.shapes, run.optim)
        with redirect_stdout(StringIO()):  # some of its optimizers print their memory use, whatever the log level
            self.engine, _, _, _ = deepspeed.initialize(
                model=stage, optimizer=optimizer, config=config, mpu=mpu, dist_init_required=False
            )
        start_optimizer_state(self.engine.optimizer)

    def shares(self) -> list[Share]:
        """This rank's part of the float32 weights and moments, as views: what is written to them is trained on."""
        return read_shares(self.engine.optimizer, self.stage.logical_parameters(), self.shapes, zero=self.zero)

    def refresh(self) -> None:
        """Make the working weights those of the shares. Collective over `dp`."""
        refresh_parameters(self.engine.optimizer, list(self.stage.parameters()), zero=self.zero)

    def set_step(self, step: int) -> None:
        """Say how many updates the restored state has had."""
        set_optimizer_step(self.engine.optimizer, step)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        return self.engine(x, targets)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Accumulate the gradients of a scalar; `is_last` marks the step's last backward."""
        self.engine.set_gradient_accumulation_boundary(is_last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def apply_gradients(self, lr: float) -> float:
        """One optimizer update at learning rate `lr`; returns the global gradient norm before clipping.

        Gradients are averaged over data-parallel ranks.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Forward passes inside keep no graph and no state of training."""
        self.engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.engine.train()


def prepare_deepspeed(runtime: Runtime) -> None:
    """Let DeepSpeed use the process groups that exist, without its shared-memory op and without its chatter."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # The CPU shared-memory op hangs across nodes, can segfault, and costs a compiler run: DESIGN section 9.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend_of(runtime.device), auto_mpi_discovery=False, verbose=False)


def num_elements(stage: Stage) -> int:
    return sum(parameter.numel() for parameter in stage.parameters())


def deepspeed_config(run: RunConfig, *, dtype: torch.dtype, device: torch.device, numel: int) -> dict[str, Any]:
    """The DeepSpeed configuration of one stage with `numel` elements."""
    bucket = min(MAX_BUCKET, -(-numel // 1024) * 1024)  # DeepSpeed wants a multiple of its alignment
    return {
        # Batches and accumulation are the runner's; DeepSpeed only wants numbers, and must divide by nothing.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": run.optim.grad_clip,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": run.parallel.zero,
            "contiguous_gradients": True,
            "overlap_comm": device.type == "cuda",
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": min(50_000_000, numel),
        },
        "steps_per_print": 2**31,
    }


def partition_(stage: Stage, config: dict[str, Any], mpu: Mpu, runtime: Runtime, *, dtype: torch.dtype) -> None:
    """Materialise and partition one module after the other, so that no rank holds more than one module whole."""
    made: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for module in stage.modules():
        if not module._parameters:
            continue
        materialise_module_(module, device=runtime.device, dtype=dtype, made=made)
        leaf = torch.nn.ParameterList([p for p in module._parameters.values() if p is not None])
        deepspeed.zero.Init(
            module=leaf, data_parallel_group=runtime.groups.dp, config_dict_or_path=config, mpu=mpu, dtype=dtype
        )


def build_optimizer(
    stage: Stage, shapes: dict[str, tuple[int, ...]], optim: OptimConfig
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) with weight decay on matrices only."""
    named = stage.logical_parameters()
    groups = [
        {"params": [named[n] for n, s in shapes.items() if len(s) > 1], "weight_decay": optim.weight_decay},
        {"params": [named[n] for n, s in shapes.items() if len(s) == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=optim.lr, betas=tuple(optim.betas), eps=optim.eps, fused=True
    )


def build_monitor(folder: Path, runtime: Runtime, *, enabled: bool) -> MonitorMaster:
    """DeepSpeed's monitor, writing TensorBoard files under `folder`."""
    prepare_deepspeed(runtime)
    tensorboard = {"enabled": enabled, "output_path": str(folder), "job_name": "tensorboard"}
    return MonitorMaster(get_monitor_config({"tensorboard": tensorboard}))
