"""Whatever a message about a misfit advises is tried: it must mend what the message is about."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
import yaml

from llama_dist.config import RunConfig, fit_layout
from llama_dist.config_checks import find_conflicts
from llama_dist.config_layouts import LAYOUT_SETTINGS
from llama_dist.config_problems import settings_of
from llama_dist.errors import UserError
from llama_dist.layout import Layout

RUN = """\
name: small
model: {vocab_size: 720, hidden_size: 96, intermediate_size: 240, num_hidden_layers: 6, num_attention_heads: 12,
  num_key_value_heads: 6, head_dim: 8, max_position_embeddings: 1024}
data: {tokenizer: t, seq_len: 96, train: [{shards: s}]}
optim: {lr: 1.0e-3, warmup_steps: 2}
train: {steps: 20, global_batch: 24}
"""
VALUES: dict[str, list[Any]] = {
    "parallel.dp": ["auto", "auto", 1, 2, 3, 4, 5],
    "parallel.tp": [1, 1, 2, 3, 4, 5],
    "parallel.pp": [1, 1, 2, 3, 4, 5, 9],
    "parallel.cp": [1, 1, 2, 3, 4, 5],
    "parallel.schedule": ["1f1b", "gpipe", "interleaved", "interleaved", "zb-h1"],
    "parallel.virtual_stages": [1, 1, 2, 2, 3, 9],
    "parallel.stage_layers": [None, None, None, [6], [3, 3], [1, 2, 3], [2, 2], [2, 1, 2, 1], [1] * 6],
    "parallel.sequence_parallel": [True, False],
    "model.num_hidden_layers": [1, 2, 4, 6, 8],
    "train.global_batch": [1, 6, 8, 24],
    "data.seq_len": [96, 96, 100, 63],
}
BASE = {**settings_of(RunConfig.model_validate(yaml.safe_load(RUN)))}
NEAREST = r"; (?:layouts of \d+ ranks? that fit|replicas that fit|no layout of \d+ ranks? fits these settings)"

Change = dict[str, Any]


def misfits(count: int) -> Iterator[Change]:
    chosen = random.Random(7)
    while count:
        known = BASE | {name: chosen.choice(values) for name, values in VALUES.items()}
        if find_conflicts(known):
            count -= 1
            yield known


def kind(problem: str) -> str:
    """What a problem is, whatever the numbers."""
    return re.sub(r"\d+", "#", problem.split(";")[0])


def full(name: str) -> str:
    (found,) = [setting for setting in LAYOUT_SETTINGS if setting in (name, f"parallel.{name}", f"model.{name}")]
    return found


def assignments(text: str) -> tuple[str, list[Any]]:
    """A setting and the values that it may take: `a=1 or 2`, `a in {1, 2}`, `a <= 2`, `a=[1, 2]`."""
    match = re.match(r"(?:for example )?([\w.]+)(?:=| in | <= )(\[.*?\]|\{.*?\}|\w+(?: or \w+)*|\d\w*)", text)
    assert match, f"cannot be read as advice: {text!r}"
    values = re.findall(r"[\w-]+", match[2]) if match[2][0] != "[" and match[2] != "1f1b" else [match[2]]
    return full(match[1]), [yaml.safe_load(value) for value in values if value != "or"]


def ways(problem: str) -> list[Change]:
    """The changes that a message names before it comes to layouts."""
    advice = re.split(NEAREST, problem)[0].split("; use ")[1]
    changes: list[Change] = []
    for way in re.split(r", or |, (?=parallel|train|data)", advice):
        parts = [assignments(part) for part in way.split(" and ")]
        if len(parts) == 1:
            name, values = parts[0]
            changes += [{name: value} for value in values]
        else:
            changes.append({name: values[0] for name, values in parts})
    return changes


def layouts(problem: str) -> list[Change]:
    """Those that a message names, the replicas too."""
    found = re.findall(r"((?:dp=\d+ )?)tp=(\d+) pp=(\d+) cp=(\d+)", problem)
    names = [f"parallel.{axis}" for axis in ("dp", "tp", "pp", "cp")]
    numbers = [[int(dp.removeprefix("dp=")) if dp else "auto", *map(int, axes)] for dp, *axes in found]
    return [dict(zip(names, one, strict=True)) for one in numbers]


def test_what_is_advised_mends_the_problem() -> None:
    tried = 0
    for known in misfits(400):
        for _, problem in find_conflicts(known):
            changes = ways(problem)
            assert changes, problem
            for change in changes:
                left = [text for _, text in find_conflicts(known | change)]
                assert kind(problem) not in map(kind, left), f"{problem}\n{change} leaves\n{left}"
            for layout in layouts(problem):
                assert find_conflicts(known | layout) == [], f"{problem}\n{layout}"
            tried += len(changes)
    assert tried > 1000


def test_what_one_misfit_alone_is_advised_is_accepted() -> None:
    """Where nothing else is wrong, a way out must not lead into another misfit."""
    for known in misfits(300):
        problems = find_conflicts(known)
        if len(problems) == 1 and known["parallel.stage_layers"] is None:  # which is not judged beside other misfits
            left = [find_conflicts(known | change) for change in ways(problems[0][1])]
            assert [] in left or layouts(problems[0][1]), f"{problems}\n{left}"


def test_layouts_are_named_only_where_some_would_do() -> None:
    """And then there are some, or it is said that this many ranks have none."""
    named = 0
    for known in misfits(200):
        text = "\n".join(problem for _, problem in find_conflicts(known))
        assert "no tp, pp and cp" not in text
        if re.search(NEAREST, text):
            named += 1
            assert layouts(text) or "no layout of" in text, f"{known}: {text}"
    assert 20 < named < 200
    alone = find_conflicts(BASE | {"parallel.schedule": "1f1b", "parallel.virtual_stages": 2, "parallel.dp": 2})
    assert len(alone) == 1 and "fit" not in alone[0][1]


def test_a_batch_that_no_number_of_replicas_shares_is_refused_while_reading() -> None:
    interleaved = {"parallel.schedule": "interleaved", "parallel.virtual_stages": 2, "parallel.pp": 3}
    ((_, problem),) = find_conflicts(BASE | interleaved | {"train.global_batch": 8})
    assert problem.startswith(
        "parallel.schedule=interleaved needs micro-batches in a multiple of parallel.pp=3, and train.global_batch=8 "
        "makes none, however many replicas share it; use train.global_batch=6 or 9, or parallel.schedule=1f1b and "
        "virtual_stages=1; replicas that fit: "
    )
    assert all(layout["parallel.pp"] in (1, 2) for layout in layouts(problem))


@pytest.mark.parametrize("seed", range(20))
def test_the_world_sizes_and_layouts_that_a_start_is_told_are_accepted(seed: int) -> None:
    chosen = random.Random(seed)
    values = yaml.safe_load(RUN)
    values["parallel"] = {"pp": chosen.choice([1, 2, 3]), "tp": chosen.choice([1, 2]), "cp": chosen.choice([1, 3])}
    if chosen.random() < 0.5:
        values["parallel"] |= {"schedule": "interleaved", "virtual_stages": 2}
    run = RunConfig.model_validate(values)
    refused = 0
    for world in range(1, 60):
        try:
            fit_layout(run, world)
        except UserError as error:
            refused += 1
            text = re.split(NEAREST, str(error))[0]
            sizes = re.search(r"world size in \{(.*?)\}|start ([\d or]+) ranks", text)
            for size in re.findall(r"\d+", sizes[0]) if sizes else []:
                assert fit_layout(run, int(size)).world == int(size), str(error)
            for axes in layouts(str(error)):
                layout = Layout(**{name.removeprefix("parallel."): n for name, n in axes.items()})
                again = RunConfig.model_validate(values | {"parallel": values["parallel"] | asdict(layout)})
                assert fit_layout(again, layout.world) == layout
    assert refused > 10
