"""Benchmarks run and print a ratio; what it is, is for a reader on a quiet machine, and no test."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path


def test_the_step_benchmark_compares_every_zero_stage(repo: Path) -> None:
    sizes = "--steps 1 --batch 1 --seq-len 8 --hidden 48 --layers 1 --vocab 64".split()
    environment = os.environ | {"PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "benchmarks/step.py", *sizes],
        cwd=repo, env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ratios = re.findall(r"^ZeRO-(\d): plain .* ours / plain (\d+\.\d+); ", done.stdout, flags=re.MULTILINE)
    assert [stage for stage, _ in ratios] == ["1", "2", "3"]
    assert all(float(ratio) > 0 for _, ratio in ratios)
