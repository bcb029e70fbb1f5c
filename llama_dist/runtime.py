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

from llama_dist.errors import RunError, UserError
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
class Channel:
    """One direction of travel between two ranks: their group, and the global rank at the other end."""

    group: dist.ProcessGroup
    peer: int


@dataclass(frozen=True)
class Channels:
    """Where a pipeline rank receives from and sends to; the last stage is followed by the first.

    Activations travel forward and gradients backward. Each is a group of its own, since on one NCCL communicator a
    send would wait behind a receive that was posted before it.
    """

    forward_in: Channel
    forward_out: Channel
    backward_in: Channel
    backward_out: Channel


@dataclass(frozen=True)
class Groups:
    """The process groups of one rank, made once and handed to whoever communicates.

    `dp`: the dp x cp ranks that hold the same slice of the model (ZeRO partitions over it). `tp`: those that hold the
    cuts of the same matrices. `cp`: those that hold the parts of the same sequences. `replica`: the tp x pp ranks of
    one (dp, cp), which hold one copy of the model. `pp`: the stages of this rank's pipeline, in order. `kv`: the
    tensor-parallel ranks that hold the same key/value head. `tied`: first and last stage of this pipeline, None on
    any other stage. `control`: all ranks, always gloo, for decisions on host integers that must not wait for a
    device. `saves`: the same ranks, for a thread that saves in the background. `channels`: to the neighbouring stages, None where the pipeline is one rank.
    """

    dp: dist.ProcessGroup
    tp: dist.ProcessGroup
    cp: dist.ProcessGroup
    replica: dist.ProcessGroup
    pp: dist.ProcessGroup
    kv: dist.ProcessGroup
    tied: dist.ProcessGroup | None
    control: dist.ProcessGroup
    saves: dist.ProcessGroup
    channels: Channels | None


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


def wait_for_device() -> None:
    """Return when this process's GPU has done all that it was given, copies to the host included."""
    torch.cuda.synchronize()


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


def start_runtime(
    environment: Environment, layout: Layout, *, device: torch.device, timeout_seconds: float, kv_heads: int
) -> Runtime:
    """Join the other ranks and make the groups of `layout`, for a model of `kv_heads`. Collective over all ranks.

    A collective that waits longer than `timeout_seconds` for a silent rank fails with an error on the ranks that wait.
    Raises UserError where rank 0 cannot listen on MASTER_PORT, and RunError where the ranks do not meet in that time.
    """
    assert layout.world == environment.world_size, f"{layout} is not a layout of {environment.world_size} ranks"
    _fill_environment(environment)
    timeout = timedelta(seconds=timeout_seconds)
    if not dist.is_initialized():
        _meet(environment, backend=backend_of(device), timeout=timeout)
    groups = _make_groups(layout, rank=environment.rank, kv_heads=kv_heads, timeout=timeout)
    if groups.channels:
        _connect(groups.channels, layout.pipeline_edges(), rank=environment.rank, device=device)
    return Runtime(environment, layout, layout.coord(environment.rank), groups, device)


def _meet(environment: Environment, *, backend: str, timeout: timedelta) -> None:
    """Make the group of all ranks. Before it exists no rank is lost: what fails here is where or when to meet."""
    rendezvous: dict[str, object] = {"init_method": "env://"}
    if environment.world_size == 1:
        # One process needs no port, so several single runs on one machine never collide.
        rendezvous = {"store": dist.HashStore()}
    rank, world = environment.rank, environment.world_size
    try:
        # No device_id: torch would then split every group off the world's communicator, which takes all ranks for
        # each of thousands of groups. Without it a communicator is made at first use, by its members alone.
        dist.init_process_group(backend=backend, rank=rank, world_size=world, timeout=timeout, **rendezvous)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        where = f"environment: MASTER_ADDR={environment.master_addr} MASTER_PORT={environment.master_port}"
        reason = str(error).splitlines()[0]
        if "server socket" in reason:
            # "..., code: -98, name: EADDRINUSE, message: address already in use"
            why = reason.rpartition("message: ")[2]
            raise UserError(
                f"{where}: rank 0 cannot listen on port {environment.master_port} of {socket.gethostname()}: {why}; "
                "end the program that has the port, or give all ranks another MASTER_PORT that is free there "
                "(1024 to 65535)"
            ) from error
        raise RunError(
            f"{where}: rank {rank} of {world} did not meet the others: {reason.rstrip('.')}; start all ranks with the "
            f"address of rank 0's node, which every node must reach, and with one port, free there "
            f"(train.timeout_seconds={timeout.total_seconds():g})"
        ) from error


def is_lost_contact(error: Exception) -> bool:
    """Whether ranks that had met failed because another is gone or silent, and not because of this rank."""
    texts = (
        "Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe", "NCCL", "timeout",
        "connectFullMesh",
    )  # fmt: skip
    if isinstance(error, RunError):
        return False  # its text says in full what it is
    lost = isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    return lost or isinstance(error, dist.DistNetworkError | dist.DistStoreError)


def stop_runtime() -> None:
    """Leave the process groups; without this a finished rank may abort while the interpreter exits."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _make_groups(layout: Layout, *, rank: int, kv_heads: int, timeout: timedelta) -> Groups:
    """Make all groups of all ranks, in one order everywhere.

    All ranks call for all groups, also for those of others, which costs them 10 microseconds each and no message:
    torch numbers the groups by call, and ranks that made only their own (`use_local_synchronization`) would name a
    group after how many groups each has, wait for each other under different names and hang.
    """
    alone = _own_group([[one] for one in range(layout.world)], rank, timeout)

    def own(groups: list[list[int]]) -> dist.ProcessGroup:
        made = alone if max(map(len, groups)) == 1 else _own_group(groups, rank, timeout)
        assert made is not None, f"rank {rank} is in none of {groups}"
        return made

    return Groups(
        dp=own(layout.data_parallel_groups()),
        tp=own(layout.tensor_groups()),
        cp=own(layout.context_groups()),
        replica=own(layout.replica_groups()),
        pp=own(layout.pipeline_groups()),
        kv=own(layout.kv_groups(kv_heads)),
        tied=_own_group(layout.tied_groups(), rank, timeout),
        control=dist.new_group(backend="gloo", timeout=timeout),
        saves=dist.new_group(backend="gloo", timeout=timeout),
        channels=_make_channels(layout.pipeline_edges(), rank, timeout),
    )


def _own_group(groups: list[list[int]], rank: int, timeout: timedelta) -> dist.ProcessGroup | None:
    """Make every group of an axis and return the one that holds `rank`."""
    made = [dist.new_group(ranks, timeout=timeout) for ranks in groups]
    return next((group for ranks, group in zip(groups, made, strict=True) if rank in ranks), None)


def _make_channels(edges: list[tuple[int, int]], rank: int, timeout: timedelta) -> Channels | None:
    """Make both channels of every edge and return the four ends that are here."""
    ends: dict[str, Channel] = {}
    for before, after in edges:
        forward, backward = (dist.new_group([before, after], timeout=timeout) for _ in range(2))
        if rank == before:
            ends |= {"forward_out": Channel(forward, after), "backward_in": Channel(backward, after)}
        if rank == after:
            ends |= {"forward_in": Channel(forward, before), "backward_out": Channel(backward, before)}
    return Channels(**ends) if ends else None


def _connect(channels: Channels, edges: list[tuple[int, int]], *, rank: int, device: torch.device) -> None:
    """Pass a byte through each channel, edge by edge in an order on which all ranks agree.

    NCCL connects two ranks in their first message and holds up both until then: a receive posted ahead on a channel
    that was never used would keep its rank from sending what the other waits for.
    """
    byte = torch.zeros(1, dtype=torch.uint8, device=device)
    for before, after in edges:
        if rank == before:
            dist.send(byte, after, group=channels.forward_out.group)
            dist.recv(byte, after, group=channels.backward_in.group)
        if rank == after:
            dist.recv(byte, before, group=channels.forward_in.group)
            dist.send(byte, before, group=channels.backward_out.group)


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
