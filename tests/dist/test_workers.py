"""The harness of the distributed tests: what goes wrong in a worker is told, in full, and harms no later test."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from workers import Pool, WorkerFailure, pool


def ranks_and_sum(value: float) -> tuple[int, int, float]:
    total = torch.tensor([value * (dist.get_rank() + 1)])
    dist.all_reduce(total)
    return dist.get_rank(), os.getpid(), float(total)


def sleep_on_rank(rank: int) -> None:
    if dist.get_rank() == rank:
        the_line_that_hangs()
    dist.barrier()


def the_line_that_hangs() -> None:
    time.sleep(600)


def fail_on_rank(rank: int) -> None:
    if dist.get_rank() == rank:
        raise KeyError("the reason of rank one")
    dist.barrier()


def leave(status: int) -> None:
    if dist.get_rank() == 0:
        os._exit(status)
    dist.barrier()


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_form_one_group_and_stay_for_the_next_call(world: int) -> None:
    first = pool(world).run(ranks_and_sum, 1.0)
    again = pool(world).run(ranks_and_sum, 2.0)
    total = world * (world + 1) / 2
    assert [(rank, value) for rank, _, value in first] == [(rank, total) for rank in range(world)]
    assert [value for *_, value in again] == [2 * total] * world
    assert [pid for _, pid, _ in first] == [pid for _, pid, _ in again]
    assert len({pid for _, pid, _ in first}) == world


def test_what_goes_wrong_fails_with_the_reason_and_the_pool_works_again() -> None:
    own = Pool(2)
    try:
        own.run(ranks_and_sum, 1.0)
        started_at, workers = time.monotonic(), own.pids
        with pytest.raises(WorkerFailure) as hang:
            own.run(sleep_on_rank, 1, timeout=2.0)
        assert time.monotonic() - started_at < 20
        assert all(gone(pid) for pid in workers)
        assert "ranks [0, 1] gave no answer within 2 s" in str(hang.value)
        sleeping = str(hang.value).split("rank 1 of 2, all threads")[1]
        assert "the_line_that_hangs" in sleeping
        assert "barrier" in str(hang.value).split("rank 1 of 2")[0]

        with pytest.raises(WorkerFailure, match="the reason of rank one") as failure:
            own.run(fail_on_rank, 1)
        assert "rank 1 of 2 failed" in str(failure.value)
        assert "fail_on_rank" in str(failure.value)

        with pytest.raises(WorkerFailure, match="rank 0 of 2 failed") as death:
            own.run(leave, 7)
        assert "ended with status 7" in str(death.value)
        assert [value for *_, value in own.run(ranks_and_sum, 1.0)] == [3.0, 3.0]
    finally:
        own.end()


def test_failure_of_the_harness_is_a_failure_of_the_test() -> None:
    assert issubclass(WorkerFailure, AssertionError)
