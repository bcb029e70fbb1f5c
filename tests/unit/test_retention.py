"""Which checkpoints stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llama_dist.checkpoint.retention import doomed
from llama_dist.train.saves import best_of


def named(*steps: int) -> list[str]:
    return [f"step-{step:08d}" for step in steps]


@pytest.mark.parametrize(
    ("steps", "rules", "gone"),
    [
        ((40, 30, 20, 10), {"keep": 2}, (20, 10)),
        ((40, 30, 20, 10), {"keep": 9}, ()),
        ((40, 30, 20, 10), {"keep": 1, "keep_every": 20}, (30, 10)),
        ((40, 30, 20, 10), {"keep": 1, "best": named(10)[0]}, (30, 20)),
        ((40, 30, 20, 10), {"keep": 2, "best": named(40)[0]}, (20, 10)),
        ((40, 30, 20, 10), {"keep": 1, "keep_every": 30, "best": named(10)[0]}, (20,)),
        # What does not verify is not one of those that stay, and is not deleted before something newer is good.
        ((40, 30, 20, 10), {"keep": 2, "damaged": named(40, 20)}, (20,)),
        ((40, 30, 20, 10), {"keep": 1, "damaged": named(30)}, (30, 20, 10)),
        ((20, 10), {"keep": 1, "damaged": named(20, 10)}, ()),
        # Nothing can be set so that the newest good one goes.
        ((20, 10), {"keep": 0}, (10,)),
        ((10,), {"keep": 0}, ()),
        ((), {"keep": 2}, ()),
    ],
)
def test_what_goes(steps: tuple[int, ...], rules: dict[str, Any], gone: tuple[int, ...]) -> None:
    assert doomed(named(*steps), **rules) == named(*gone)


def evaluated(folder: Path, scores: dict[int, Any]) -> Path:
    for step, value in scores.items():
        results = {"heldout": {"loss": value}, "a/b.jsonl": {"accuracy": value}}
        (folder / f"step-{step:08d}.json").write_text(json.dumps({"step": step, "results": results}))
    return folder


@pytest.mark.parametrize(
    ("metric", "best"),
    [("heldout/loss", 20), ("a/b.jsonl/accuracy", 10), ("heldout/none", None), ("absent/loss", None), ("loss", None)],
)
def test_the_best_by_a_metric(tmp_path: Path, metric: str, best: int | None) -> None:
    evals = evaluated(tmp_path, {10: 3.0, 20: 1.5, 30: 2.0, 50: 0.1})
    names = named(40, 30, 20, 10)  # step 50 was evaluated and is not saved, step 40 the other way round
    assert best_of(evals, metric, names) == (named(best)[0] if best else None)


def test_of_equals_the_newest_is_best_and_what_cannot_be_read_is_none(tmp_path: Path) -> None:
    evals = evaluated(tmp_path, {10: 2.0, 20: 2.0, 30: 2.5})
    (evals / "step-00000030.json").write_text('{"step": 30, "resul')
    (evals / "step-00000040.json").write_text('{"results": {"heldout": {"loss": null}}}')
    assert best_of(evals, "heldout/loss", named(40, 30, 20, 10)) == named(20)[0]
    assert best_of(tmp_path / "absent", "heldout/loss", named(10)) is None
