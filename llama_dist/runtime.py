"""From a launcher's environment to a device and explicit process groups: the only place that chooses gloo or NCCL."""

from __future__ import annotations

import logging
import os
import re
import resource
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from llama_dist.errors import UserError
from llama_dist.layout import Coord, Layout

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Environment:
    """Who this process is, as its launcher says."""

    launcher: str  # "torchrun", "deepspeed", "slurm", "mpi", "env" or "single"
    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int


@dataclass(frozen=True)
class Groups:
    """The process groups of one rank, made once and handed to whoever communicates.

    `dp`: the ranks that hold the same slice of the model (ZeRO partitions over it). `replica`: the tp x pp ranks that
    hold one copy of the model. `pp`: the stages of this rank's pipeline, in order. `control`: all ranks, always gloo,
    for decisions on host integers that must not wait for a device.
    """

    dp: dist.ProcessGroup
    replica: dist.ProcessGroup
    pp: dist.ProcessGroup
    control: dist.ProcessGroup


@dataclass(frozen=True)
class Runtime:
    """What a rank knows of its place: environment, layout, groups and device."""

    environment: Environment
    layout: Layout
    coord: Coord
    groups: Groups
    device: torch.device

    @property
    def rank(self) -> int:
        return self.environment.rank

    @property
    def is_coordinator(self) -> bool:
        return self.environment.rank == 0


def read_environment(env: Mapping[str, str] | None = None) -> Environment:
    """Recognise torchrun, the deepspeed launcher, Slurm, Open MPI, a plain RANK/WORLD_SIZE contract, or one process.

    Raises UserError where the launcher's variables are incomplete or contradict each other.
    """
    env = os.environ if env is None else env
    if "RANK" in env or "WORLD_SIZE" in env:
        launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in env else "deepspeed" if "CROSS_RANK" in env else "env"
        return _environment(env, launcher, "RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "OMPI_COMM_WORLD_RANK" in env:
        names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
        return _environment(env, "mpi", *names)
    # A job step has SLURM_STEP_ID; the batch script itself must count as one process.
    if env.get("SLURM_NTASKS", "1") != "1" and "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        return _environment(env, "slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    return Environment("single", 0, 1, 0, "127.0.0.1", 0)


def _environment(env: Mapping[str, str], launcher: str, rank: str, world: str, local: str) -> Environment:
    numbers = {}
    for name, default in ((rank, None), (world, None), (local, "0"), ("MASTER_PORT", "0")):
        text = env.get(name, default)
        if text is None or not re.fullmatch("[0-9]{1,9}", text):
            given = f"{name} is not set" if text is None else f"{name}={text!r} is not a whole number"
            raise UserError(
                f"environment: {given}; {launcher} must set {rank} and {world} together, or neither (then it is one rank)"
            )
        numbers[name] = int(text)
    if not 0 <= numbers[rank] < numbers[world]:
        raise UserError(
            f"environment: {rank}={numbers[rank]} is outside {world}={numbers[world]}; ranks count from 0"
        )
    if numbers["MASTER_PORT"] > 65535:
        raise UserError(f"environment: MASTER_PORT={numbers['MASTER_PORT']} is no port; ports go up to 65535")
    address = env.get("MASTER_ADDR", "")
    if numbers[world] > 1 and (not address or not numbers["MASTER_PORT"]):
        raise UserError(
            f"environment: MASTER_ADDR={address!r} MASTER_PORT={env.get('MASTER_PORT', '')!r}; "
            f"{numbers[world]} ranks need both to find each other; see launch/README.md"
        )
    return Environment(
        launcher, numbers[rank], numbers[world], numbers[local], address or "127.0.0.1", numbers["MASTER_PORT"]
    )


def has_gpu() -> bool:
    """Whether this machine shows at least one GPU to this process."""
    return torch.cuda.is_available()


def best_device() -> torch.device:
    """For work in one process: a GPU where there is one."""
    return torch.device("cuda" if has_gpu() else "cpu")


def backend_of(device: torch.device) -> str:
    """What collectives on tensors of a device run on."""
    return "nccl" if device.type == "cuda" else "gloo"


def device_name(device: torch.device) -> str:
    """The maker's name of a GPU; "cpu" for the host."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held: allocated on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def pick_device(environment: Environment, wanted: str) -> torch.device:
    """The device of this rank; `wanted` is "auto" (a GPU where there is one), "cpu" or "cuda"."""
    have = torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and have == 0):
        return torch.device("cpu")
    if environment.local_rank >= have:
        raise UserError(
            f"train.device={wanted}: local rank {environment.local_rank} has no GPU of its own on "
            f"{socket.gethostname()}, which shows {have}; start one rank per GPU, or set train.device=cpu"
        )
    device = torch.device("cuda", environment.local_rank)
    torch.cuda.set_device(device)
    return device


def start_runtime(environment: Environment, layout: Layout, *, device: torch.device, timeout_seconds: float) -> Runtime:
    """Join the other ranks and make the groups of `layout`. Collective over all ranks.

    A collective that waits longer than `timeout_seconds` for a silent rank fails with an error on the ranks that wait.
    """
    assert layout.world == environment.world_size, f"{layout} is not a layout of {environment.world_size} ranks"
    _fill_environment(environment)
    timeout = timedelta(seconds=timeout_seconds)
    rendezvous: dict[str, object] = {"init_method": "env://"}
    if environment.world_size == 1:
        # One process needs no port, so several single runs on one machine never collide.
        rendezvous = {"store": dist.HashStore()}
    if not dist.is_initialized():
        dist.init_process_group(
            backend=backend_of(device),
            rank=environment.rank,
            world_size=environment.world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
            **rendezvous,
        )
    groups = Groups(
        dp=_own_group(layout.data_parallel_groups(), environment.rank, timeout),
        replica=_own_group(layout.replica_groups(), environment.rank, timeout),
        pp=_own_group(layout.pipeline_groups(), environment.rank, timeout),
        control=dist.new_group(backend="gloo", timeout=timeout),
    )
    return Runtime(environment, layout, layout.coord(environment.rank), groups, device)


def is_lost_contact(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone or silent, and not because of this rank."""
    texts = (
        "Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe", "NCCL", "timeout",
        "connectFullMesh",
    )  # fmt: skip
    lost = isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    return lost or isinstance(error, dist.DistNetworkError | dist.DistStoreError)


def stop_runtime() -> None:
    """Leave the process groups; without this a finished rank may abort while the interpreter exits."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _own_group(groups: list[list[int]], rank: int, timeout: timedelta) -> dist.ProcessGroup:
    """Make every group of an axis (all ranks must call for all of them) and return the one that holds `rank`."""
    own = None
    for ranks in groups:
        group = dist.new_group(ranks, timeout=timeout)
        if rank in ranks:
            own = group
    assert own is not None, f"rank {rank} is in none of {groups}"
    return own


def _fill_environment(environment: Environment) -> None:
    """Write the contract that DeepSpeed reads, whatever launcher was found."""
    os.environ["RANK"] = str(environment.rank)
    os.environ["WORLD_SIZE"] = str(environment.world_size)
    os.environ["LOCAL_RANK"] = str(environment.local_rank)
    os.environ["MASTER_ADDR"] = environment.master_addr
    os.environ["MASTER_PORT"] = str(environment.master_port)


def gather_texts(texts: list[str], *, group: dist.ProcessGroup | None) -> list[str]:
    """All ranks' texts on every rank, sorted and each once; without a group those of this process."""
    if group is None:
        return texts
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(everyone, texts, group=group)
    return sorted({text for one in everyone for text in one})


def all_reduce_sum(values: list[float], *, group: dist.ProcessGroup) -> list[float]:
    """Sum host numbers over a gloo group, in float64 so that token counts stay exact."""
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, group=group)
    return tensor.tolist()
