"""Runs that train on text which nobody prepared: killed and moved to another size, they read the same samples."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import psutil
import pytest
from test_resume import EVERY, STEPS, WORDS, Ended, Start, Started, curve_of, events_of, home, start

from llama_dist import cli
from llama_dist.config import load_config
from llama_dist.data.loader import Loader
from llama_dist.data.shards import load_manifest, verify
from llama_dist.data.stream import END, STREAMS, Spools

__all__ = ["home", "start"]  # the fixtures


@pytest.fixture(scope="module")
def text(home: Path) -> Path:
    """Fewer samples than the run takes, so that it comes to a second epoch."""
    lines = (" ".join(random.Random(i).choices(WORDS, k=60)) + f" ({i})\n" for i in range(90))
    path = home / "stream.jsonl"
    path.write_text("".join(json.dumps({"body": line}) + "\n" for line in lines))
    return path


def stream(start: Start, text: Path, folder: Path, *overrides: str, ranks: int = 2, column: str = "body") -> Started:
    source = f"{{stream: {{path: {text}, text: {column}, window: 16}}}}"
    return start(folder, "eval.every=0", "data.heldout=null", *overrides, f"data.train=[{source}]", ranks=ranks)


def ended_well(run: Started) -> Ended:
    ended = run.end()
    assert ended.status == 0, ended.output
    return ended


def test_a_stream_is_read_alike_through_a_kill_and_another_size(
    start: Start, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "run"
    ended_well(stream(start, text, undisturbed))
    exact = curve_of(undisturbed)
    assert [row[0] for row in exact] == list(range(1, STEPS + 1)) and exact[-1][2] < exact[0][2] - 1

    run = stream(start, text, folder)
    coordinator = run.rank(0)
    run.wait_for_step(EVERY + 2)
    children = coordinator.children(recursive=True)
    coordinator.kill()
    ended = run.end()
    assert ended.status == 128 + signal.SIGKILL and "no contact with another rank" in ended.output
    assert children, "one reads the stream"
    assert psutil.wait_procs(children, timeout=10)[1] == [], "it ends with the coordinator"
    (spool,) = (folder / STREAMS).iterdir()
    before = {path.name: path.stat().st_mtime_ns for path in spool.glob("*.bin")}

    ended_well(stream(start, text, folder, ranks=1))
    assert events_of(folder, "resume")[0]["step"] == EVERY
    assert before and {path.name: path.stat().st_mtime_ns for path in spool.glob("*.bin")} == before, "read once"
    verify(spool)
    assert END in load_manifest(spool).files
    curve = curve_of(folder)
    assert [row[:2] for row in curve] == [row[:2] for row in exact]
    for (*_, loss, norm, _), (*_, exact_loss, exact_norm, _) in zip(curve, exact, strict=True):
        assert (loss, norm) == pytest.approx((exact_loss, exact_norm), rel=1e-5)
    assert epochs_of(folder) > 1, "the text was read again after its end"
    told = []
    for path in (undisturbed, folder):
        assert cli.main(["data", "why", str(path), "--step", str(STEPS), "--json"]) == 0
        told.append(capsys.readouterr().out.replace(str(path), "RUN"))
    assert told[0] == told[1] and told[0].count(str(Path("RUN") / STREAMS)) >= 8


def epochs_of(folder: Path) -> float:
    run = load_config(folder / "config.yaml")
    sizes = {"vocab_size": run.model.vocab_size, "global_batch": run.train.global_batch, "micro_batch": 1}
    loader = Loader(run.data, dp=1, dp_rank=0, spools=Spools(folder / STREAMS), **sizes)
    loader.microbatches(0)
    (size,) = loader.num_samples
    assert size
    return STEPS * run.train.global_batch / size


def test_a_stream_without_its_column_ends_all_ranks_in_a_line(start: Start, text: Path, tmp_path: Path) -> None:
    ended = stream(start, text, tmp_path / "run", column="text").end()
    assert ended.status == 2, ended.output
    wrong = 'stream.jsonl:1: no string "text" (found: keys \'body\')'
    assert wrong in ended.output and "Traceback" not in ended.output, ended.output
    logs = [(tmp_path / "run" / "logs" / f"rank-{rank:05d}.log").read_text() for rank in range(2)]
    assert all(wrong in log and "no contact" not in log for log in logs)
