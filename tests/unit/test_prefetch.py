"""Steps read ahead are the steps themselves; errors come where their step is asked for; nothing hangs."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from data_helpers import make_shards, small_tokenizer

from llama_dist.config_data import DataConfig, Source
from llama_dist.data.loader import Batch, Loader
from llama_dist.data.prefetch import Prefetching
from llama_dist.errors import UserError

FAR = 10**9


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    path = make_shards(tmp_path_factory.mktemp("shards"), documents=20, pair_tokens=300)
    return DataConfig(tokenizer=str(small_tokenizer()), train=[Source(shards=str(path))], seq_len=16)


def loader_of(data: DataConfig) -> Loader:
    return Loader(data, vocab_size=340, global_batch=4, micro_batch=2, dp=1, dp_rank=0)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def same(found: list[Batch], expected: list[Batch]) -> bool:
    return len(found) == len(expected) and all(
        torch.equal(a.tokens, b.tokens) and a.documents == b.documents for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("steps", [0, 1, 2, 7])
def test_steps_ahead_are_the_steps(data: DataConfig, steps: int) -> None:
    plain = loader_of(data)
    with Prefetching(loader_of(data), steps=steps, until=60) as ahead:
        for consumed in [*range(0, 60, 4), *range(8, 20, 4), 2, 6, 10, 40, 0, *range(48, 72, 4), 60, 56, 60]:
            assert same(ahead.microbatches(consumed), plain.microbatches(consumed)), consumed
        assert len(threads()) <= 1
    assert threads() == []


class Counting(Loader):
    """Says which steps were read, and fails at one of them."""

    def __init__(self, data: DataConfig, fails_at: int = -1) -> None:
        super().__init__(data, vocab_size=340, global_batch=4, micro_batch=2, dp=1, dp_rank=0)
        self.read: list[int] = []
        self.fails_at = fails_at

    def microbatches(self, samples_consumed: int) -> list[Batch]:
        if samples_consumed == self.fails_at:
            raise UserError("the disk is gone")
        self.read.append(samples_consumed)
        return super().microbatches(samples_consumed)


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.002)


def test_no_more_steps_than_asked_for_are_read_ahead_and_none_behind_the_end(
    data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = Counting(data)
    monkeypatch.setattr("llama_dist.data.prefetch.HANDED_OVER", loader.tokens_per_step)
    with Prefetching(loader, steps=3, until=24) as ahead:
        ahead.microbatches(0)
        wait_until(lambda: loader.read == [0, 4, 8, 12])
        time.sleep(0.05)
        assert loader.read == [0, 4, 8, 12]
        ahead.microbatches(4)
        wait_until(lambda: loader.read[-1] == 16)
        for consumed in (8, 12, 16, 20):
            ahead.microbatches(consumed)
        assert loader.read == list(range(0, 24, 4))
        wait_until(lambda: not any(thread.is_alive() for thread in threads()))


def test_small_steps_are_handed_over_together(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = Counting(data)
    monkeypatch.setattr("llama_dist.data.prefetch.HANDED_OVER", 3 * loader.tokens_per_step)
    with Prefetching(loader, steps=2, until=FAR) as ahead:
        ahead.microbatches(0)
        wait_until(lambda: loader.read == list(range(0, 28, 4)))  # the first, and two threes
        for consumed in (4, 8, 12):
            ahead.microbatches(consumed)
        wait_until(lambda: loader.read == list(range(0, 40, 4)))
        time.sleep(0.05)
        assert loader.read == list(range(0, 40, 4))


def test_an_error_comes_where_its_step_is_asked_for(data: DataConfig) -> None:
    loader = Counting(data, fails_at=8)
    with Prefetching(loader, steps=4, until=FAR) as ahead:
        for consumed in (0, 4):
            assert same(ahead.microbatches(consumed), loader_of(data).microbatches(consumed))
        for _ in range(2):  # again and again, and not a hang
            with pytest.raises(UserError, match="the disk is gone"):
                ahead.microbatches(8)
        loader.fails_at = -1
        assert same(ahead.microbatches(8), loader_of(data).microbatches(8))
    assert threads() == []


def test_closing_does_not_wait_for_anybody_to_take_the_steps(data: DataConfig) -> None:
    for steps in (1, 5):
        ahead = Prefetching(loader_of(data), steps=steps, until=FAR)
        ahead.microbatches(0)
        started_at = time.monotonic()
        ahead.close()
        ahead.close()
        assert time.monotonic() - started_at < 5 and threads() == []
    with pytest.raises(RuntimeError, match="of the training"):
        with Prefetching(loader_of(data), steps=2, until=FAR) as ahead:
            ahead.microbatches(0)
            raise RuntimeError("of the training")
    assert threads() == []


@pytest.mark.parametrize("end", ["pass", "raise SystemExit(3)", "raise ValueError('x')"])
def test_a_process_that_never_closes_it_still_ends(data: DataConfig, end: str, tmp_path: Path) -> None:
    script = tmp_path / "ends.py"
    script.write_text(
        textwrap.dedent(
            f"""
            from llama_dist.config_data import DataConfig
            from llama_dist.data.loader import Loader
            from llama_dist.data.prefetch import Prefetching
            data = DataConfig.model_validate_json({data.model_dump_json()!r})
            loader = Loader(data, vocab_size=340, global_batch=4, micro_batch=2, dp=1, dp_rank=0)
            Prefetching(loader, steps=2, until=10**9).microbatches(0)
            {end}
            """
        )
    )
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    status = {"pass": 0, "raise SystemExit(3)": 3}.get(end, 1)
    assert ended.returncode == status, ended.stderr
