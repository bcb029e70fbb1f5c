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
from llama_dist.pipeline.deferred import Terms, WeightGradients, hand_over
from llama_dist.pipeline.gathering import BackwardCounts, gather_options, hold_gathered_
from llama_dist.pipeline.partitions import (
    Share,
    clear_gradients,
    read_shares,
    refresh_parameters,
    set_optimizer_step,
    start_optimizer_state,
    tied_gradient,
)
from llama_dist.pipeline.schedule import SPLIT_BACKWARD
from llama_dist.pipeline.stage import TIED, Stage, materialise_, materialise_module_
from llama_dist.pipeline.zero_patch import compare_traces_within_
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


class Root:
    """Where the backward of an output begins; it does not keep the output's values, which only the next stage reads."""

    def __init__(self, output: Tensor) -> None:
        self._gradients: list[Tensor] = []
        self._scalar = _Inject.apply(output, self._gradients)

    def scalar(self, gradient: Tensor) -> Tensor:
        """A scalar whose backward, once, gives the output its `gradient`: DeepSpeed's backward takes scalars only."""
        self._gradients.append(gradient)
        return self._scalar


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, gradients: list[Tensor]) -> Tensor:
        ctx.gradients = gradients
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.gradients.pop(), None


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
        tied = run.model.tie_word_embeddings and runtime.layout.pp > 1
        self._tied_group = runtime.groups.tied if tied else None
        self._weight_gradients = WeightGradients()
        self._holds = run.parallel.zero == 3 and run.parallel.gather == "step"
        config = deepspeed_config(run, stage, dtype=dtype, device=runtime.device)
        mpu = Mpu(runtime.groups)
        if self.zero == 3:
            partition_(stage, config, mpu, runtime, dtype=dtype)
        else:
            materialise_(stage, device=runtime.device, dtype=dtype)
        # DeepSpeed counts a parameter into the global gradient norm where it is marked, or on model-parallel rank 0,
        # which owns all that it holds: so each slice of the model is counted once, however many ranks hold it.
        for name, parameter in stage.logical_parameters().items():
            parameter.model_parallel = stage.slices[name].owner
        alone = self._alone() if tied else None
        optimizer = build_optimizer(stage, self.shapes, run.optim, alone=alone)
        with redirect_stdout(StringIO()):  # some of its optimizers print their memory use, whatever the log level
            self.engine, _, _, _ = deepspeed.initialize(
                model=stage, optimizer=optimizer, config=config, mpu=mpu, dist_init_required=False
            )
        if self.zero == 3:
            compare_traces_within_(self.engine.optimizer, runtime.groups.dp, device=runtime.device)
            self._counts = BackwardCounts(stage)
        # DeepSpeed's own forward would take the backward of an input for one of its own, and reduce gradients after it.
        self._compute = self.engine
        if run.parallel.schedule in SPLIT_BACKWARD:
            self._compute = stage
            self._weight_gradients.defer_(stage)
        start_optimizer_state(self.engine.optimizer)
        clear_gradients(self.engine.optimizer, zero=self.zero)

    def shares(self) -> list[Share]:
        """This rank's part of the float32 weights and moments, as views: what is written to them is trained on."""
        return read_shares(self.engine.optimizer, self.stage.logical_parameters(), self.shapes, zero=self.zero)

    def refresh(self) -> None:
        """Make the working weights those of the shares. Collective over `dp`."""
        refresh_parameters(self.engine.optimizer, list(self.stage.parameters()), zero=self.zero)

    def set_step(self, step: int) -> None:
        """Say how many updates the restored state has had."""
        set_optimizer_step(self.engine.optimizer, step)

    def start_step(self) -> None:
        """Prepare for the forwards and backwards of one update. Collective over `dp`."""
        if self._holds:
            hold_gathered_(self.stage.parameters())

    def forward(self, x: Tensor, targets: Tensor | None = None, **place: Any) -> Tensor:
        """As `Stage.forward`."""
        return self._compute(x, targets, **place)

    def backward(self, root: Root, gradient: Tensor, *, is_last: bool) -> None:
        """Accumulate the gradients that follow from that of an output; `is_last` marks the step's last backward."""
        self._prepare_backward(is_last=is_last)
        self.engine.backward(root.scalar(gradient), scale_wrt_gas=False)

    def backward_input(self, root: Root, gradient: Tensor) -> Terms:
        """Only the part of a backward that the stage before waits for; returns what `backward_weights` needs."""
        if self.zero == 3:
            self._counts.restore_()
        with self._weight_gradients.noting() as terms:
            root.scalar(gradient).backward()
        if self.zero == 3:
            # Token ids have no gradient, by which ZeRO-3 would see that the embedding's backward is done.
            self.engine.optimizer.parameter_offload.release_backward_leftovers()
        return terms

    def backward_weights(self, terms: Terms, *, is_last: bool) -> None:
        """The other part: accumulate the weights' gradients; `is_last` marks the step's last."""
        self._prepare_backward(is_last=is_last)
        # What the engine's forward would have had done when this backward begins.
        self.engine.optimizer.backward_prologue()
        self.engine.optimizer.enter_backward()
        with hand_over(terms) as scalar:
            self.engine.backward(scalar, scale_wrt_gas=False)

    def _prepare_backward(self, *, is_last: bool) -> None:
        # DeepSpeed turns the page to the next micro-batch in a forward; between two backwards it must be told, or the
        # second overwrites the first.
        self.engine.optimizer.clear_backward_seen_flag()
        if self.zero == 3:
            self._counts.restore_()
        self.engine.set_gradient_accumulation_boundary(is_last)

    def apply_gradients(self, lr: float) -> float:
        """One optimizer update at learning rate `lr`; returns the global gradient norm before clipping.

        Gradients are averaged over data-parallel ranks.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        if self._tied_group is not None:
            gradient = tied_gradient(self.engine.optimizer, self.stage.logical_parameters()[TIED], zero=self.zero)
            dist.all_reduce(gradient, group=self._tied_group)
        self.engine.step()
        clear_gradients(self.engine.optimizer, zero=self.zero)
        return float(self.engine.get_global_grad_norm())

    def _alone(self) -> str:
        """The weight that has a parameter group of its own, where the pipeline's ends hold the same weight.

        Alone in its group it is partitioned alike on both ends. Norms are summed over the stages group by group, so
        that those in between must have as many groups.
        """
        return TIED if self._tied_group is not None else next(n for n, s in self.shapes.items() if len(s) > 1)

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


def deepspeed_config(run: RunConfig, stage: Stage, *, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The DeepSpeed configuration of the engine of one (meta) stage."""
    largest_layer = stage.largest_layer()
    # A buffer of this size lives through the run: a layer is enough to overlap, and the whole stage would cost what
    # ZeRO-3 saves. DeepSpeed wants a multiple of its alignment.
    bucket = min(MAX_BUCKET, -(-largest_layer // 1024) * 1024)
    gathering = gather_options(run.parallel.gather, largest_layer=largest_layer, hidden_size=run.model.hidden_size)
    reduction = {"communication_data_type": "fp32"} if run.train.reduce_precision == "fp32" else {}
    return {
        # Batches and accumulation are the runner's; DeepSpeed only wants numbers, and must divide by nothing.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": run.optim.grad_clip,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        **reduction,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": run.parallel.zero,
            "contiguous_gradients": True,
            # ZeRO-1 and 2 would wait for the whole device after every backward, and with it for messages under way.
            "overlap_comm": device.type == "cuda" and run.parallel.zero == 3,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            # Norms are summed over the stages sub-group by sub-group: each must have as many as the others.
            "sub_group_size": 2**62,
            **gathering,
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
    stage: Stage, shapes: dict[str, tuple[int, ...]], optim: OptimConfig, *, alone: str | None = None
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) with weight decay on matrices only; `alone` gets a group of its own."""
    named = stage.logical_parameters()
    matrices = [name for name, shape in shapes.items() if len(shape) > 1]
    groups = [
        {"params": [named[n] for n in matrices if n != alone], "weight_decay": optim.weight_decay},
        {"params": [named[n] for n, s in shapes.items() if len(s) == 1], "weight_decay": 0.0},
        {"params": [named[n] for n in matrices if n == alone], "weight_decay": optim.weight_decay},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=optim.lr, betas=tuple(optim.betas), eps=optim.eps, fused=True
    )


def build_monitor(folder: Path, runtime: Runtime, *, enabled: bool) -> MonitorMaster:
    """DeepSpeed's monitor, writing TensorBoard files under `folder`."""
    prepare_deepspeed(runtime)
    tensorboard = {"enabled": enabled, "output_path": str(folder), "job_name": "tensorboard"}
    return MonitorMaster(get_monitor_config({"tensorboard": tensorboard}))
