"""A few trials of chaos.py, whose 200 are run by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos import make_home, run_trials

TRIALS = [3, 8, 11, 17]


@pytest.mark.timeout(600)
def test_killed_runs_go_on_to_the_same_end_and_lose_no_committed_step(tmp_path: Path) -> None:
    make_home(tmp_path)
    chaos = run_trials(tmp_path, TRIALS, seed=5, processes=2)
    assert not chaos.failed, chaos.failed
    assert chaos.counts["trials"] == len(TRIALS)
    assert sum(count for what, count in chaos.counts.items() if what.startswith("killed")) >= len(TRIALS) / 2
