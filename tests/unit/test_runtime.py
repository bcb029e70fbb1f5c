"""From a launcher's environment to a device and groups, in one process; more ranks are in tests/dist."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from llama_dist import runtime as module
from llama_dist.errors import RunError, UserError
from llama_dist.layout import Coord, Layout
from llama_dist.runtime import (
    Environment,
    all_reduce_sum,
    backend_of,
    is_lost_contact,
    peak_memory_bytes,
    pick_device,
    read_environment,
    start_runtime,
    stop_runtime,
)

MEETING = {"MASTER_ADDR": "node7", "MASTER_PORT": "29501"}
PLAIN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **MEETING}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1", **MEETING}
SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", **MEETING}
LAUNCHERS = {
    "torchrun": {**PLAIN, "TORCHELASTIC_RUN_ID": "none"},
    "deepspeed": {**PLAIN, "CROSS_RANK": "0"},
    "env": PLAIN,
    "mpi": OPEN_MPI,
    "slurm": SLURM,
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_is_recognised(launcher: str) -> None:
    assert read_environment(LAUNCHERS[launcher]) == Environment(launcher, 3, 8, 1, "node7", 29501)


def test_without_a_launcher_it_is_one_process() -> None:
    assert read_environment({}) == Environment("single", 0, 1, 0, "127.0.0.1", 0)
    # Inside a batch script Slurm sets all but the step: that is no rank.
    assert read_environment({k: v for k, v in SLURM.items() if k != "SLURM_STEP_ID"}).launcher == "single"


def test_torchrun_inside_a_slurm_step_counts_as_torchrun() -> None:
    environment = read_environment({**SLURM, **LAUNCHERS["torchrun"], "RANK": "5"})
    assert (environment.launcher, environment.rank) == ("torchrun", 5)


@pytest.mark.parametrize(("given", "missing"), [({"RANK": "1"}, "WORLD_SIZE"), ({"WORLD_SIZE": "2"}, "RANK")])
def test_half_a_contract_is_not_one_process(given: dict[str, str], missing: str) -> None:
    """Ranks that each train alone on one folder would be worse than none."""
    with pytest.raises(UserError, match=f"{missing} is not set; env must set RANK and WORLD_SIZE together, or neither"):
        read_environment(given)


def test_one_rank_needs_no_meeting_point() -> None:
    assert read_environment({"RANK": "0", "WORLD_SIZE": "1"}) == Environment("env", 0, 1, 0, "127.0.0.1", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "x"}, "RANK='x' is not a whole number; env must set RANK and WORLD_SIZE together"),
        ({"RANK": "\u00b2"}, "RANK='\u00b2' is not a whole number"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no port"),
        ({"RANK": "-1"}, "RANK='-1' is not a whole number"),
        ({"RANK": "8"}, "RANK=8 is outside WORLD_SIZE=8; ranks count from 0"),
        ({"WORLD_SIZE": "0"}, "RANK=3 is outside WORLD_SIZE=0"),
        ({"LOCAL_RANK": "a"}, "LOCAL_RANK='a'"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
        ({"MASTER_PORT": ""}, "MASTER_PORT=''"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR='' .*8 ranks need both to find each other; see launch/README.md"),
    ],
)
def test_a_broken_environment_is_said(change: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_environment({**PLAIN, **change})


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> list[torch.device]:
    """Pretend that this machine shows `count` GPUs; returns what `set_device` was called with."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def test_each_local_rank_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = with_gpus(monkeypatch, 2)
    environment = read_environment(PLAIN)
    assert pick_device(environment, "auto") == torch.device("cuda", 1)
    assert pick_device(environment, "cuda") == torch.device("cuda", 1)
    assert chosen == [torch.device("cuda", 1)] * 2
    assert pick_device(environment, "cpu") == torch.device("cpu")


def test_more_ranks_than_gpus_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 1)
    with pytest.raises(UserError, match="train.device=auto: local rank 1 has no GPU of its own on .*, which shows 1"):
        pick_device(read_environment(PLAIN), "auto")


def test_without_gpus_auto_is_the_cpu_and_cuda_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 0)
    assert pick_device(read_environment({}), "auto") == torch.device("cpu")
    with pytest.raises(UserError, match="train.device=cuda: .*set train.device=cpu"):
        pick_device(read_environment({}), "cuda")


def test_backends() -> None:
    assert backend_of(torch.device("cpu")) == "gloo"
    assert backend_of(torch.device("cuda", 0)) == "nccl"


def test_peak_memory_counts_what_was_given_back() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    assert 10_000_000 < before < 200_000_000_000
    held = torch.ones(before // 4 + 10_000_000)  # float32: more than has ever been held
    del held
    assert peak_memory_bytes(torch.device("cpu")) > before


def test_a_single_process_has_all_groups_and_leaves_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what is written is taken back
    environment = read_environment({})
    runtime = start_runtime(environment, Layout(1), device=torch.device("cpu"), timeout_seconds=30, kv_heads=4)
    try:
        assert (runtime.rank, runtime.coord, runtime.is_coordinator) == (0, Coord(dp=0, tp=0, pp=0, cp=0), True)
        groups = runtime.groups
        for name in ("dp", "tp", "cp", "replica", "pp", "kv", "control"):
            assert dist.get_world_size(getattr(groups, name)) == 1
        assert groups.tied is None and groups.channels is None
        assert dist.get_backend(groups.control) == "gloo"
        # float32 would round these, and token counts must stay exact.
        assert all_reduce_sum([2.0**52 + 1, 0.1], group=groups.control) == [2.0**52 + 1, 0.1]
        assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "1")
    finally:
        stop_runtime()
    assert not dist.is_initialized()
    stop_runtime()


def start_two(monkeypatch: pytest.MonkeyPatch, port: int, *, timeout_seconds: float) -> None:
    """What rank 0 of two does, in an environment that is taken back."""
    values = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    cpu = torch.device("cpu")
    start_runtime(read_environment(), Layout(2), device=cpu, timeout_seconds=timeout_seconds, kv_heads=4)


def test_a_port_that_another_program_has_is_a_mistake_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError) as caught:
            start_two(monkeypatch, port, timeout_seconds=30)
    assert str(caught.value) == (
        f"environment: MASTER_ADDR=127.0.0.1 MASTER_PORT={port}: rank 0 cannot listen on port {port} of "
        f"{socket.gethostname()}: address already in use; end the program that has the port, or give all ranks another "
        "MASTER_PORT that is free there (1024 to 65535)"
    )
    assert not is_lost_contact(caught.value)


def test_ranks_that_never_came_are_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = r"MASTER_PORT=\d+: rank 0 of 2 did not meet the others: Timed out .* 1/2 clients joined; start all ranks"
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(RunError, match=expected) as caught:
            start_two(monkeypatch, held.getsockname()[1], timeout_seconds=1)
    assert not is_lost_contact(caught.value)


def test_a_store_that_falls_silent_is_lost_contact() -> None:
    with pytest.raises(dist.DistStoreError) as caught:
        dist.HashStore().wait(["never"], timedelta(milliseconds=10))
    assert is_lost_contact(caught.value)


def test_a_layout_of_another_size_is_a_defect() -> None:
    with pytest.raises(AssertionError, match="dp=2 tp=1 pp=1 cp=1 is not a layout of 1 ranks"):
        start_runtime(read_environment({}), Layout(2), device=torch.device("cpu"), timeout_seconds=1, kv_heads=4)
    assert module.dist.is_initialized() is False
