"""Benchmarks run, and what they count is what theory says; how fast anything is, is for a reader on a quiet machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from data_helpers import small_tokenizer, text_of
from torch import nn

BATCH, SEQ_LEN, HIDDEN, LAYERS, VOCAB = 8, 64, 64, 4, 64  # benchmarks/layouts.py --quick, in micro-batches of 1
PARAMETERS = 2 * VOCAB * HIDDEN + HIDDEN + LAYERS * (2 * HIDDEN + 3 * HIDDEN * HIDDEN + 3 * HIDDEN * 128)
MIB = 2**20
NAMES = ("tokenising, workers", "loader")  # what the first columns of benchmarks/data.py are called


def run_benchmark(repo: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", *arguments],
        cwd=repo, env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


def read_table(text: str) -> list[dict[str, str]]:
    """The rows of a Markdown table by their headings."""
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]]


def numbers(cell: str) -> list[float]:
    return [float(number) for number in cell.split(" / ")]


def test_the_step_benchmark_compares_every_zero_stage(repo: Path) -> None:
    sizes = "--steps 1 --batch 1 --seq-len 8 --hidden 48 --layers 1 --vocab 64".split()
    done = run_benchmark(repo, "step", *sizes)
    assert done.returncode == 0, done.stderr
    ratios = re.findall(r"^ZeRO-(\d): plain .* ours / plain (\d+\.\d+); ", done.stdout, flags=re.MULTILINE)
    assert [stage for stage, _ in ratios] == ["1", "2", "3"]
    assert all(float(ratio) > 0 for _, ratio in ratios)


def test_layouts_send_what_theory_says(repo: Path) -> None:
    layouts = ["dp2", "tp2", "pp2", "dp2,zero3,step"]
    done = run_benchmark(repo, "layouts", "--quick", "--layouts", " ".join([*layouts, "dp2,nonsense"]))
    rows = {row["layout"]: row for row in read_table(done.stdout)}
    assert list(rows) == [*layouts, "dp2,nonsense"], done.stdout + done.stderr

    assert rows["dp2,nonsense"]["micro-batches"] == "failed" and done.returncode == 1
    assert "'nonsense' means nothing" in done.stderr
    for name in layouts:
        row = rows[name]
        assert float(row["counted / paper"]) == pytest.approx(1, abs=0.01), row
        assert numbers(row["x dp"])[0] > 0 and row["clean"].endswith("/2")
        assert numbers(row["peak"])[0] > numbers(row["state"])[0] > 0 and numbers(row["kept"])[0] > 0

    # By hand, for what one of two ranks sends: float32 gradients and weights; hidden states of a micro-batch.
    states = 4 * HIDDEN * SEQ_LEN
    all_gather = 4 * PARAMETERS / 2
    all_reduces = (4 * LAYERS + 2) * states + 3 * 4 * SEQ_LEN
    assert numbers(rows["dp2"]["dp"])[0] == pytest.approx(3 * all_gather / MIB, abs=0.02)
    assert numbers(rows["dp2,zero3,step"]["dp"])[0] == pytest.approx((BATCH / 2 + 1) * all_gather / MIB, abs=0.02)
    assert numbers(rows["tp2"]["tp"])[0] == pytest.approx(BATCH * all_reduces / MIB, abs=0.02)
    assert numbers(rows["pp2"]["pp"])[0] == pytest.approx(BATCH * states / MIB, abs=0.02)
    assert all(rows["pp2"][axis] == "-" for axis in ("dp", "tp", "cp"))


def test_building_holds_a_share_and_one_module(repo: Path, tmp_path: Path) -> None:
    model = tmp_path / "small.yaml"
    model.write_text(
        "vocab_size: 2048\nhidden_size: 768\nintermediate_size: 2048\nnum_hidden_layers: 4\nnum_attention_heads: 6\n"
        "max_position_embeddings: 64\n"
    )
    done = run_benchmark(repo, "construction", "--built", str(model), "--layers", "4")
    assert done.returncode == 0, done.stderr
    planned, built = (read_table(part) for part in done.stdout.split("Built: "))
    assert [row["layers"] for row in planned] == ["20"] * 4
    # Of 68.98 billion parameters on tp=8 x pp=4, norms are on every tp rank; 18 bytes for each, over dp=8.
    assert sum(float(row["share"]) for row in planned) == pytest.approx(68.98e9 / 8 * 18 / 8 / 2**30, rel=0.002)
    assert all(float(row["held"]) < 50 for row in planned)
    assert [row["stage"] for row in built] == ["0", "0", "1", "1"]
    # A stage held whole would be 1.6 times the bound; a few megabytes are of DeepSpeed's and gloo's own.
    assert all(0.5 < float(row[f"{phase}: ratio"]) < 1.2 for row in built for phase in ("weights", "all")), built


def test_the_data_benchmark_has_a_row_for_each_contender(repo: Path, tmp_path: Path) -> None:
    """Those that are not installed are told of; what ours make of the text is what sentencepiece does."""
    (tmp_path / "text.txt").write_text("".join(text_of(i, words=600) for i in range(40)))
    sizes = "--mb 0.3 --tokens 3e5 --length 128 --seconds 0.05 --repeat 1 --only ours alone bare litdata".split()
    done = run_benchmark(repo, "data", "--corpora", str(tmp_path), "--tokenizer", str(small_tokenizer()), *sizes)
    assert done.returncode == 0, done.stderr
    tables = [read_table(part) for part in done.stdout.split("\n\n") if part.startswith("|")]
    text, loaders = ({row[name]: row for row in table} for table, name in zip(tables, NAMES, strict=True))
    assert {"ours, 1", "ours, 2", "sentencepiece alone", "once: ours, 1", "more: ours, 2"} <= text.keys()
    assert loaders.keys() == {"bare memory map", "ours", "ours, read ahead", "litdata"}
    for rows, speed in ((text, "MB/s"), (loaders, "Mtok/s")):
        for label, row in rows.items():
            measured = row[speed] != "not installed"
            assert float(row[speed]) > 0 if measured else "ours" not in label, row
    assert float(loaders["ours"]["memory MiB"]) < 200
    assert done.stdout.count(": met") + done.stdout.count(": MISSED") + done.stdout.count("not measured") == 20


@pytest.fixture
def traffic(repo: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(repo / "benchmarks")
    return pytest.importorskip("traffic")


def test_volumes_are_those_of_ring_algorithms(traffic) -> None:
    data, everyone = torch.zeros(8), torch.zeros(32)
    assert traffic.sent_bytes("allreduce_", ([data],), ranks=4) == 2 * 3 / 4 * 32
    assert traffic.sent_bytes("_allgather_base_", (everyone, data), ranks=4) == 3 * 32
    assert traffic.sent_bytes("allgather_", ([[data] * 4], [data]), ranks=4) == 3 * 32
    assert traffic.sent_bytes("_reduce_scatter_base_", (data, everyone), ranks=4) == 3 * 32
    assert traffic.sent_bytes("alltoall_base_", (data, data), ranks=4) == 3 / 4 * 32
    assert traffic.sent_bytes("send", ([data],), ranks=2) == 32
    assert traffic.sent_bytes("recv_", ([data],), ranks=2) == 0
    with pytest.raises(NotImplementedError, match="gather_"):
        traffic.sent_bytes("gather_", ([data],), ranks=2)


def test_kept_activations_are_counted_once_and_until_their_backward(traffic) -> None:
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 16, bias=False))
    x = torch.randn(4, 16, requires_grad=True)
    with traffic.SavedActivations(model) as kept:
        model(x).sum().backward()
        # The input, and the ReLU's output, which two of the modules keep: never the weights.
        assert kept.peak == 2 * 4 * 16 * 4
        model(x[:2]).sum().backward()
        assert kept.peak == 2 * 4 * 16 * 4
        model(x), model(x)  # x is kept once for both
        assert kept.peak == 3 * 4 * 16 * 4
