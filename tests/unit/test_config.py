"""Reading configs: what they mean, and what is said about one that is wrong."""

from __future__ import annotations

import itertools
import re
import time
from dataclasses import asdict
from math import log2
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from llama_dist.config import (
    ModelConfig,
    RunConfig,
    build_config,
    dump_config,
    fit_layout,
    load_config,
    load_model_config,
    micro_batch_of,
)
from llama_dist.config_layouts import nearest_layouts
from llama_dist.config_problems import list_settings, settings_of
from llama_dist.errors import UserError
from llama_dist.layout import Layout

MODEL = """\
vocab_size: 512
hidden_size: 64
intermediate_size: 176
num_hidden_layers: 2
num_attention_heads: 4
num_key_value_heads: 2
max_position_embeddings: 256
"""
RUN = """\
name: small
model: model.yaml
parallel:
  micro_batch: 2
data:
  tokenizer: tok.model
  train:
    - shards: shards/a
    - shards: shards/b
      weight: 2.5
  seq_len: 64
optim:
  lr: 1e-4
  warmup_steps: 2
train:
  steps: 20
  global_batch: 8
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    (tmp_path / "model.yaml").write_text(MODEL)
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    """The lines of the error that loading raises, each without the folder of the test."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value).replace(f"{path.parent}/", "").split("\n")


def replaced(path: Path, old: str, new: str) -> Path:
    text = path.read_text()
    assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times"
    path.write_text(text.replace(old, new))
    return path


# Reading


def test_a_file_gives_its_values_and_defaults(run_file: Path) -> None:
    run = load_config(run_file)
    assert run.optim.lr == 1e-4
    assert isinstance(run.optim.lr, float)
    assert run.folder == "runs/small"
    assert [(source.shards, source.weight) for source in run.data.train] == [("shards/a", 1.0), ("shards/b", 2.5)]
    assert run.model.head_dim == 16
    assert run.model.num_key_value_heads == 2
    assert run.parallel.dp == "auto"
    assert run.optim.betas == (0.9, 0.95)
    assert run.checkpoint.keep == 2


def test_key_value_heads_default_to_the_query_heads(run_file: Path) -> None:
    replaced(run_file.parent / "model.yaml", "num_key_value_heads: 2\n", "")
    assert load_config(run_file).model.num_key_value_heads == 4


def test_the_tree_is_frozen(run_file: Path) -> None:
    run = load_config(run_file)
    with pytest.raises(ValidationError, match="frozen"):
        run.train.steps = 3  # type: ignore[misc]


def test_model_may_be_a_mapping_in_place(run_file: Path) -> None:
    expected = load_config(run_file)
    inline = "model:\n" + "".join(f"  {line}\n" for line in MODEL.splitlines())
    replaced(run_file, "model: model.yaml\n", inline)
    (run_file.parent / "model.yaml").unlink()
    assert load_config(run_file) == expected


def test_model_file_is_relative_to_the_run_file(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run_file.parent.parent)
    assert load_config(Path(run_file.parent.name) / "run.yaml").model.hidden_size == 64


def test_anchors_and_merge_keys(run_file: Path) -> None:
    replaced(run_file, "    - shards: shards/a\n", "    - &first {shards: shards/a, weight: 3}\n")
    replaced(run_file, "    - shards: shards/b\n      weight: 2.5\n", "    - *first\n    - {<<: *first, weight: 7}\n")
    sources = load_config(run_file).data.train
    assert [(source.shards, source.weight) for source in sources] == [
        ("shards/a", 3.0),
        ("shards/a", 3.0),
        ("shards/a", 7.0),
    ]


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E-4", 1e-4), ("1.e-4", 1e-4), ("1", 1.0), (".5", 0.5), ("1e+2", 100.0), ("2.5e-1", 0.25)],
)
def test_numbers_are_what_they_look_like(run_file: Path, text: str, value: float) -> None:
    lr = load_config(run_file, [f"optim.lr={text}"]).optim.lr
    assert lr == value
    assert type(lr) is float


def test_underscores_group_digits(run_file: Path) -> None:
    assert load_config(run_file, ["train.steps=476_837"]).train.steps == 476837


def test_a_byte_order_mark_is_not_part_of_the_first_key(run_file: Path) -> None:
    run_file.write_bytes(b"\xef\xbb\xbf" + run_file.read_bytes())
    assert load_config(run_file).name == "small"


# Overrides


def test_overrides_reach_every_level_and_apply_in_order(run_file: Path) -> None:
    overrides = [
        "train.steps=5",
        "train.steps=50",
        "data.train.0.weight=4",
        "checkpoint.every=10",
        "model.hidden_size=128",
        "optim.betas=[0.8, 0.9]",
        "eval.choices=[a.jsonl]",
        "folder=x=y",
    ]
    run = load_config(run_file, overrides)
    assert run.train.steps == 50
    assert run.data.train[0].weight == 4.0
    assert run.checkpoint.every == 10
    assert (run.model.hidden_size, run.model.head_dim) == (128, 32)
    assert run.optim.betas == (0.8, 0.9)
    assert run.eval.choices == ["a.jsonl"]
    assert run.folder == "x=y"


def test_an_override_opens_a_section_that_was_absent(run_file: Path) -> None:
    rope = ("factor=8", "low_freq_factor=1", "high_freq_factor=4", "original_max_position_embeddings=128")
    scaling = load_config(run_file, [f"model.rope_scaling.{item}" for item in rope]).model.rope_scaling
    assert scaling is not None
    assert scaling.factor == 8.0


def test_an_override_names_another_model_file(run_file: Path) -> None:
    other = run_file.parent / "other.yaml"
    other.write_text(MODEL.replace("num_hidden_layers: 2", "num_hidden_layers: 3"))
    run = load_config(run_file, [f"model={other}", "model.vocab_size=1024"])
    assert (run.model.num_hidden_layers, run.model.vocab_size) == (3, 1024)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("foo", "override 'foo': is not of the form section.key=value; write for example train.steps=100"),
        ("=3", "override '=3': is not of the form section.key=value; write for example train.steps=100"),
        ("train..steps=3", "is not of the form section.key=value"),
        ("train.steps=", "override 'train.steps=': has no value"),
        ("train.steps.x=3", "train.steps is a value, not a section; set train.steps itself"),
        ("train.steps=abc", "train.steps='abc' is not allowed; it takes a whole number >= 1"),
        ("train.steps=[1", "override 'train.steps=[1': is not YAML"),
        ("train={steps: 20, steps: 30}", "train.steps was given already; keep one"),
        ("data.train.2.weight=1", "data.train is a list of 2; use an index from 0 to 1"),
        ("data.train.x.weight=1", "data.train is a list of 2; use an index from 0 to 1"),
        ("train.warmup_steps=3", "train.warmup_steps is not a setting; did you mean optim.warmup_steps?"),
        ("tran.steps=3", "tran is not a setting; did you mean train?"),
        ("train.0=3", "train.0 is not a setting"),
        ("model=missing.yaml", "model='missing.yaml': missing.yaml: there is no such file"),
        ("data.heldout=7", "data.heldout=7 is not allowed; it takes non-empty text or null; put it in quotes"),
    ],
)
def test_a_wrong_override_is_named(run_file: Path, override: str, expected: str) -> None:
    (line, *more) = problems(run_file, override)
    assert line.startswith(f"override {override!r}: ")
    assert expected in line
    assert all(override in other for other in more)


# Files that cannot be read


def test_missing_file_names_the_nearest(run_file: Path) -> None:
    assert problems(run_file.parent / "rnu.yaml") == [
        f"rnu.yaml: there is no such file; did you mean {run_file}?".replace(f"{run_file.parent}/", "")
    ]


def test_missing_file_without_a_near_one_lists_the_folder(run_file: Path) -> None:
    (line,) = problems(run_file.parent / "quite-another-thing.yaml")
    assert line.endswith("has model.yaml, run.yaml")


def test_missing_folder(tmp_path: Path) -> None:
    (line,) = problems(tmp_path / "nowhere" / "run.yaml")
    assert "there is no such file (nor a directory" in line


def test_directory(run_file: Path) -> None:
    with pytest.raises(UserError, match=r"is a directory; name a YAML file; .* has model\.yaml, run\.yaml"):
        load_config(run_file.parent)


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n"])
def test_empty_file(run_file: Path, text: str) -> None:
    run_file.write_text(text)
    assert problems(run_file) == ["run.yaml: the file is empty; it must hold a mapping of settings (key: value)"]


@pytest.mark.parametrize(("text", "kind"), [("- a\n- b\n", "a list"), ("hello", "a single value")])
def test_not_a_mapping(run_file: Path, text: str, kind: str) -> None:
    run_file.write_text(text)
    assert problems(run_file) == [f"run.yaml: the file holds {kind}; it must hold a mapping of settings (key: value)"]


def test_not_utf8_names_the_line(run_file: Path) -> None:
    run_file.write_bytes(b"name: a\nfolder: caf\xe9\n")
    assert problems(run_file) == ["run.yaml:2: byte 0xe9 is not UTF-8 text; save the file as UTF-8"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name: a\ntrain: {steps: 1\n", 3),
        ("name: a\n\ttrain: 1\n", 2),
        ("name: a\nfolder: b: c\n", 2),
        ("name: a\n---\nname: b\n", 2),
        ("name: *nothing\n", 1),
        ("name: a\nfolder: b\x07\n", 2),
    ],
)
def test_broken_yaml_names_the_line(run_file: Path, text: str, line: int) -> None:
    run_file.write_text(text)
    (problem,) = problems(run_file)
    assert problem.startswith(f"run.yaml:{line}: is not YAML: ")


def test_deep_nesting_is_an_error_and_not_a_crash(run_file: Path) -> None:
    run_file.write_text("name: " + "[" * 2000)
    (problem,) = problems(run_file)
    assert problem.startswith("run.yaml")


def test_an_alias_of_itself_is_an_error(run_file: Path) -> None:
    replaced(run_file, "  lr: 1e-4\n", "  lr: &lr [*lr]\n")
    assert "run.yaml:13: optim.lr.0 contains itself through an alias" in problems(run_file)


def test_tags_are_refused(run_file: Path) -> None:
    replaced(run_file, "steps: 20\n", "steps: !!python/object/apply:os.system [ls]\n")
    assert any(line.startswith("run.yaml:16: train.steps") for line in problems(run_file))


def test_missing_model_file_is_one_problem(run_file: Path) -> None:
    replaced(run_file, "model: model.yaml", "model: modell.yaml")
    assert problems(run_file) == [
        "run.yaml:2: model='modell.yaml': modell.yaml: there is no such file; did you mean model.yaml?"
    ]


def test_model_file_problems_name_the_model_file(run_file: Path) -> None:
    replaced(run_file.parent / "model.yaml", "hidden_size: 64", "hiden_size: 64")
    assert problems(run_file) == [
        "model.yaml: model.hidden_size is missing; it takes a whole number >= 1",
        "model.yaml:2: model.hiden_size is not a setting; did you mean model.hidden_size?",
    ]


# Settings that are wrong


def test_equal_keys_are_an_error(run_file: Path) -> None:
    replaced(run_file, "  steps: 20\n", "  steps: 20\n  seed: 1\n  steps: 30\n")
    assert problems(run_file) == ["run.yaml:18: train.steps was given on line 16 already; keep one"]


def test_equal_sections_are_an_error(run_file: Path) -> None:
    run_file.write_text(RUN + "optim:\n  lr: 1\n")
    assert problems(run_file) == ["run.yaml:18: optim was given on line 12 already; keep one"]


def test_equal_keys_in_the_model_file_are_an_error(run_file: Path) -> None:
    (run_file.parent / "model.yaml").write_text(MODEL + "vocab_size: 3\n")
    assert problems(run_file) == ["model.yaml:8: vocab_size was given on line 1 already; keep one"]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("train.step=3", "train.step is not a setting; did you mean train.steps?"),
        ("optim.warmup_step=3", "optim.warmup_step is not a setting; did you mean optim.warmup_steps?"),
        ("train.warmup_step=3", "train.warmup_step is not a setting; did you mean optim.warmup_steps?"),
        ("train.every=3", "train.every is not a setting; did you mean checkpoint.every or checkpoint.local.every or eval.every?"),
        ("lr=3", "lr is not a setting; did you mean optim.lr?"),
        ("model.n_heads=3", "model.n_heads is not a setting; model has vocab_size, hidden_size"),
        ("data.train.0.wieght=1", "data.train.0.wieght is not a setting; did you mean data.train.0.weight?"),
        ("zzz=1", "zzz is not a setting; the file has name, folder, model"),
    ],
)
def test_an_unknown_key_names_the_nearest(run_file: Path, setting: str, expected: str) -> None:
    (line,) = problems(run_file, setting)
    assert expected in line


def test_a_dotted_key_in_a_file_is_shown_how_to_nest(run_file: Path) -> None:
    run_file.write_text(RUN + "checkpoint.every: 3\n")
    assert problems(run_file) == ["run.yaml:18: 'checkpoint.every' is not a setting; write every inside checkpoint:"]


def test_missing_settings_are_named_with_what_they_take(run_file: Path) -> None:
    replaced(run_file, "  steps: 20\n", "")
    replaced(run_file, "name: small\n", "")
    assert problems(run_file) == [
        "run.yaml: name is missing; it takes text of letters, digits, '.', '_' and '-'",
        "run.yaml:14: train.steps is missing; it takes a whole number >= 1",
    ]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ('train.steps="3"', "train.steps='3' is not allowed; it takes a whole number >= 1; take the quotes away"),
        ("train.steps=true", "train.steps=true is not allowed; it takes a whole number >= 1"),
        ("train.steps=1.5", "train.steps=1.5 is not allowed"),
        ("train.steps=2e5", "train.steps=200000.0 is not allowed; it takes a whole number >= 1; write 200000"),
        ("train.steps=0", "train.steps=0 is not allowed"),
        ("train.steps=-1", "train.steps=-1 is not allowed"),
        ("train.steps=null", "train.steps=null is not allowed"),
        ("train.steps=012", "train.steps='012' is not allowed"),
        ("train.steps=1:30", "train.steps='1:30' is not allowed"),
        ("train.steps=[1]", "train.steps=[1] is not allowed"),
        ("train.seed=-1", "train.seed=-1 is not allowed; it takes a whole number >= 0 and < 9223372036854775808"),
        ('optim.lr="1e-4"', "optim.lr='1e-4' is not allowed; it takes a number > 0; take the quotes away"),
        ("optim.lr=.nan", "optim.lr=nan is not allowed"),
        ("optim.lr=.inf", "optim.lr=inf is not allowed"),
        ("optim.lr=1e999", "optim.lr=inf is not allowed"),
        ("optim.lr=true", "optim.lr=true is not allowed"),
        ("optim.lr=0", "optim.lr=0 is not allowed; it takes a number > 0"),
        ("optim.betas=[0.9, 1.0]", "optim.betas.1=1.0 is not allowed; it takes a number >= 0 and < 1"),
        ("optim.betas=[-0.1, 0.9]", "optim.betas.0=-0.1 is not allowed"),
        ("optim.betas=[0.9]", "optim.betas=[0.9] is not allowed; it takes a list of 2, each a number >= 0 and < 1"),
        ("optim.betas=0.9", "optim.betas=0.9 is not allowed; it takes a list of 2"),
        ("optim.grad_clip=-1", "optim.grad_clip=-1 is not allowed; it takes a number >= 0"),
        ("optim.min_lr_ratio=1.1", "optim.min_lr_ratio=1.1 is not allowed; it takes a number >= 0 and <= 1"),
        ("optim.weight_decay=.nan", "optim.weight_decay=nan is not allowed"),
        ("parallel.zero=4", "parallel.zero=4 is not allowed; it takes a whole number >= 1 and <= 3"),
        ("parallel.zero=true", "parallel.zero=true is not allowed"),
        ("parallel.dp=0", "parallel.dp=0 is not allowed; it takes a whole number >= 1 or auto"),
        ("parallel.dp=all", "parallel.dp='all' is not allowed; it takes a whole number >= 1 or auto"),
        ("parallel.activation_checkpointing=1", "one of none, full, selective or a whole number >= 2"),
        ("parallel.activation_checkpointing=true", "parallel.activation_checkpointing=true is not allowed"),
        ("train.precision=fp16", "train.precision='fp16' is not allowed; it takes one of auto, bf16, fp32"),
        ("train.device=gpu", "train.device='gpu' is not allowed; it takes one of auto, cpu, cuda"),
        ("metrics.tensorboard=yes", "metrics.tensorboard='yes' is not allowed; it takes true or false"),
        ("metrics.tensorboard=1", "metrics.tensorboard=1 is not allowed; it takes true or false"),
        ("data.train=[]", "data.train=[] is not allowed; it takes a non-empty list of a mapping with shards, weight"),
        ("data.train=shards/a", "data.train='shards/a' is not allowed"),
        ("data.train.0.weight=0", "data.train.0.weight=0 is not allowed; it takes a number > 0"),
        ("data.train.0.epochs=0", "data.train.0.epochs=0 is not allowed; it takes a number > 0 or null"),
        ("data.packing=best", "data.packing='best' is not allowed; it takes one of concat, best_fit"),
        ("data.prefetch=-1", "data.prefetch=-1 is not allowed; it takes a whole number >= 0"),
        ("data.curriculum=[{step: 0, weights: {shards/a: 1}}]", "data.curriculum.0.step=0 is not allowed"),
        (
            "data.curriculum=[{step: 1, weights: {}}]",
            "data.curriculum.0.weights={} is not allowed; it takes a non-empty mapping of non-empty text to a number >= 0",
        ),
        ("data.curriculum=[{step: 1, weights: {shards/a: -1}}]", "data.curriculum.0.weights={'shards/a': -1} is not all"),
        ("data.tokenizer=''", "data.tokenizer='' is not allowed; it takes non-empty text"),
        ("name=a/b", "name='a/b' is not allowed; it takes text of letters, digits, '.', '_' and '-'"),
        ("name=7", "name=7 is not allowed"),
        ("checkpoint=null", "checkpoint=null is not allowed; it takes a mapping with every, keep"),
        ("model=null", "model=null is not allowed; it takes a mapping with vocab_size"),
        ("eval.choices=a.jsonl", "eval.choices='a.jsonl' is not allowed; it takes a list of non-empty text"),
    ],
)
def test_a_wrong_value_is_shown_with_what_is_allowed(run_file: Path, setting: str, expected: str) -> None:
    (line,) = problems(run_file, setting)
    assert expected in line


def test_sources_and_the_curriculum_go_by_name(run_file: Path) -> None:
    assert [source.name for source in load_config(run_file).data.train] == ["shards/a", "shards/b"]
    run = load_config(
        run_file,
        ["data.train.0.name=a", "data.train.1.epochs=2.5", "data.curriculum=[{step: 3, weights: {a: 1}}]"],
    )
    assert (run.data.train[0].name, run.data.train[1].epochs) == ("a", 2.5)
    assert [(entry.step, entry.weights) for entry in run.data.curriculum] == [(3, {"a": 1.0})]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["data.train.0.name=shards/b"], "data.train: 2 sources (data.train.0, data.train.1) are called 'shards/b'"),
        (
            ["data.curriculum=[{step: 3, weights: {a: 1}}]"],
            "data.curriculum.0.weights: data.train has no source 'a'; it has shards/a, shards/b",
        ),
        (
            ["data.curriculum=[{step: 3, weights: {shards/a: 0}}]"],
            "data.curriculum.0.weights are all 0; give at least one source a weight above 0",
        ),
        (
            ["data.curriculum=[{step: 3, weights: {shards/a: 1}}, {step: 3, weights: {shards/b: 1}}]"],
            "data.curriculum.1.step=3 does not come after data.curriculum.0.step=3; put the steps in rising order",
        ),
    ],
)
def test_a_mixture_that_cannot_be_is_explained(run_file: Path, settings: list[str], expected: str) -> None:
    (line,) = problems(run_file, *settings)
    assert expected in line


def test_the_same_shards_twice_need_names_only_for_a_curriculum(run_file: Path) -> None:
    assert load_config(run_file, ["data.train.1.shards=shards/a"]).data.train[1].name == "shards/a"
    (line,) = problems(
        run_file, "data.train.1.shards=shards/a", "data.curriculum=[{step: 3, weights: {shards/a: 1}}]"
    )
    assert "are called 'shards/a'; give each a name of its own" in line


def test_a_long_value_is_cut(run_file: Path) -> None:
    (line,) = problems(run_file, "train.steps=" + "x" * 5000)
    assert len(line) < 5300  # the override itself is quoted in full, its value only once
    assert "xxx... is not allowed" in line


def test_a_number_of_ten_thousand_digits_is_an_error(run_file: Path) -> None:
    replaced(run_file, "steps: 20", "steps: " + "9" * 10000)
    assert all(len(line) < 200 and line.startswith("run.yaml:16: train.steps") for line in problems(run_file))


def test_all_problems_are_reported_each_on_its_line(run_file: Path) -> None:
    replaced(run_file, "  lr: 1e-4\n  warmup_steps: 2\n", "  lr: '1e-4'\n  lr: 3\n  warmup_steps: 2000\n  clip: 1\n")
    replaced(run_file, "  seq_len: 64\n", "  seq_len: 1024\n")
    replaced(run_file, "  global_batch: 8\n", "  global_batch: 7\n  device: gpu\n")
    (run_file.parent / "model.yaml").write_text(MODEL.replace("heads: 2", "heads: 3"))
    lines = problems(run_file, "bad", "parallel.pp=9")
    expected = [
        "run.yaml:14: optim.lr was given on line 13 already; keep one",
        "override 'bad': is not of the form",
        "run.yaml:13: optim.lr='1e-4' is not allowed",
        "run.yaml:16: optim.clip is not a setting; did you mean optim.grad_clip?",
        "run.yaml:20: train.device='gpu' is not allowed",
        "model.yaml:6: model.num_key_value_heads=3 does not divide model.num_attention_heads=4",
        "override 'parallel.pp=9': parallel.pp=9 exceeds model.num_hidden_layers=2",
        "run.yaml:15: optim.warmup_steps=2000 exceeds train.steps=20",
        "run.yaml:11: data.seq_len=1024 exceeds model.max_position_embeddings=256",
    ]
    assert len(lines) == len(expected), "\n".join(lines)
    for start in expected:
        assert sum(line.startswith(start) for line in lines) == 1, f"{start!r} not once in\n" + "\n".join(lines)


# Settings that do not fit together


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            ["model.num_key_value_heads=3"],
            "model.num_key_value_heads=3 does not divide model.num_attention_heads=4; "
            "use num_key_value_heads in {1, 2, 4}",
        ),
        (
            ["model.hidden_size=66"],
            "model.num_attention_heads=4 does not divide model.hidden_size=66; "
            "use num_attention_heads in {1, 2, 3, 6, 11, 22, 33, 66}, or give model.head_dim",
        ),
        (["model.hidden_size=60"], "model.head_dim=15 is odd, and rotary embeddings turn pairs; use head_dim=14 or 16"),
        (["model.head_dim=7"], "model.head_dim=7 is odd, and rotary embeddings turn pairs; use head_dim=6 or 8"),
        (
            ["model.hidden_size=2", "model.num_key_value_heads=4"],
            "model.num_attention_heads=4 does not divide model.hidden_size=2",
        ),
        (
            ["parallel.tp=4", "model.num_attention_heads=12", "model.head_dim=8", "model.num_key_value_heads=6"],
            "parallel.tp=4 neither divides model.num_key_value_heads=6 nor is a multiple of it; use tp in {1, 2}",
        ),
        (
            ["parallel.tp=3"],
            "parallel.tp=3 does not divide model.num_attention_heads=4; use tp in {1, 2, 4}; "
            "replicas that fit: tp=4 pp=1 cp=1, tp=2 pp=1 cp=1, tp=4 pp=2 cp=1",
        ),
        (
            ["parallel.tp=3", "parallel.dp=2", "model.num_hidden_layers=3"],
            "; layouts of 6 ranks that fit: dp=2 tp=1 pp=3 cp=1, dp=1 tp=2 pp=3 cp=1, dp=1 tp=1 pp=3 cp=2",
        ),
        (
            ["parallel.tp=3", "parallel.dp=2"],
            "; no layout of 6 ranks fits these settings; of other sizes: dp=2 tp=2 pp=1 cp=1 (4), "
            "dp=2 tp=4 pp=1 cp=1 (8), dp=2 tp=1 pp=1 cp=1 (2)",
        ),
        (
            ["parallel.cp=3"],
            "parallel.cp=3 does not divide the 4 query heads of a rank (model.num_attention_heads=4, parallel.tp=1); "
            "use cp in {1, 2, 4}",
        ),
        (
            ["parallel.cp=4", "parallel.tp=2"],
            "parallel.cp=4 does not divide the 2 query heads of a rank (model.num_attention_heads=4, parallel.tp=2); "
            "use cp in {1, 2}",
        ),
        (
            ["parallel.cp=4", "model.num_attention_heads=12", "model.head_dim=8", "model.num_key_value_heads=6"],
            "parallel.cp=4 neither divides the 6 key/value heads of a rank (model.num_key_value_heads=6, "
            "parallel.tp=1) nor is a multiple of it; use cp in {1, 2, 3, 6, 12}",
        ),
        (
            ["parallel.cp=2", "data.seq_len=63"],
            "data.seq_len=63 does not split over parallel.cp=2 ranks; use data.seq_len=62 or 64",
        ),
        (
            ["parallel.tp=4", "data.seq_len=62", "parallel.sequence_parallel=true"],
            "data.seq_len=62 does not split over parallel.cp * parallel.tp = 1 * 4 = 4 ranks; "
            "use data.seq_len=60 or 64, or parallel.sequence_parallel=false",
        ),
        (
            ["parallel.virtual_stages=2"],
            "parallel.virtual_stages=2 is for parallel.schedule=interleaved, and it is 1f1b; "
            "use virtual_stages=1, or schedule=interleaved",
        ),
        (
            ["parallel.schedule=interleaved"],
            "parallel.schedule=interleaved needs parallel.virtual_stages of 2 or more (it is 1f1b over those); "
            "use for example virtual_stages=2, or schedule=1f1b",
        ),
        (
            ["parallel.schedule=interleaved", "parallel.virtual_stages=2", "parallel.pp=2"],
            "parallel.pp * parallel.virtual_stages = 2 * 2 = 4 chunks of a layer or more exceed "
            "model.num_hidden_layers=2; use pp <= 1, or pp=2 and virtual_stages=1 and schedule=1f1b",
        ),
        (
            ["parallel.schedule=interleaved", "parallel.pp=2"],
            "parallel.schedule=interleaved needs parallel.virtual_stages of 2 or more (it is 1f1b over those), and "
            "model.num_hidden_layers=2 is fewer than the 4 chunks of parallel.pp=2 times 2; use schedule=1f1b, or "
            "pp <= 1 and virtual_stages=2",
        ),
        (
            ["parallel.schedule=interleaved", "parallel.virtual_stages=3"],
            "parallel.pp * parallel.virtual_stages = 1 * 3 = 3 chunks of a layer or more exceed "
            "model.num_hidden_layers=2; use virtual_stages <= 2",
        ),
        (
            ["parallel.schedule=interleaved", "parallel.virtual_stages=2", "model.num_hidden_layers=8",
             "parallel.pp=4", "parallel.dp=4"],
            "parallel.schedule=interleaved needs micro-batches in a multiple of parallel.pp=4, and 2 sequences for each "
            "replica (train.global_batch=8 / dp=4) make none; use train.global_batch=16, or parallel.dp in {1, 2}, or "
            "parallel.schedule=1f1b and virtual_stages=1; layouts of 16 ranks that fit: dp=4 tp=2 pp=2 cp=1, dp=2 tp=2 pp=4 cp=1, "
            "dp=4 tp=1 pp=2 cp=2",
        ),
        (
            ["parallel.stage_layers=[1, 2]", "parallel.pp=2"],
            "parallel.stage_layers=[1, 2] adds up to 3 layers, and model.num_hidden_layers=2; "
            "use for example stage_layers=[1, 1], or stage_layers=null to split by cost",
        ),
        (
            ["parallel.stage_layers=[2]", "parallel.pp=2"],
            "parallel.stage_layers=[2] has 1 entries for parallel.pp * parallel.virtual_stages = 2 * 1 = 2 chunks; "
            "use for example stage_layers=[1, 1], or stage_layers=null to split by cost; "
            "replicas that fit: tp=1 pp=1 cp=1, tp=2 pp=1 cp=1, tp=1 pp=1 cp=2",
        ),
        (["parallel.stage_layers=[0, 2]"], "parallel.stage_layers.0=0 is not allowed; it takes a whole number >= 1"),
        (["parallel.stage_layers=[]"], "parallel.stage_layers=[] is not allowed"),
        (["parallel.schedule=zb"], "it takes one of 1f1b, gpipe, interleaved, zb-h1"),
        (
            ["parallel.tp=2", "model.vocab_size=513"],
            "parallel.tp=2 does not divide model.vocab_size=513; use tp in {1}",
        ),
        (
            ["parallel.tp=2", "model.intermediate_size=175"],
            "parallel.tp=2 does not divide model.intermediate_size=175; use tp in {1}",
        ),
        (["parallel.pp=3"], "parallel.pp=3 exceeds model.num_hidden_layers=2; use pp <= 2"),
        (
            ["parallel.activation_checkpointing=5"],
            "parallel.activation_checkpointing=5 exceeds model.num_hidden_layers=2",
        ),
        (
            ["parallel.dp=3"],
            "train.global_batch=8 does not split evenly over 3 replicas; "
            "use train.global_batch=6 or 9, or parallel.dp in {1, 2, 4, 8}",
        ),
        (["optim.warmup_steps=21"], "optim.warmup_steps=21 exceeds train.steps=20; use warmup_steps <= 20"),
        (["optim.decay_steps=3"], "optim.decay_steps=3 is for optim.schedule=wsd"),
        (["optim.schedule=wsd"], "optim.schedule=wsd needs optim.decay_steps; use for example decay_steps=2"),
        (
            ["optim.schedule=wsd", "optim.decay_steps=19"],
            "optim.decay_steps=19 and optim.warmup_steps=2 exceed train.steps=20; use decay_steps <= 18",
        ),
        (["data.seq_len=257"], "data.seq_len=257 exceeds model.max_position_embeddings=256; use seq_len <= 256"),
        (["eval.every=5"], "eval.every=5 with nothing to evaluate; give data.heldout"),
        (["eval.every=5", "eval.perplexity=false", "data.heldout=x"], "eval.every=5 with nothing to evaluate"),
        (["checkpoint.best=heldout/loss", "data.heldout=x"], "checkpoint.best='heldout/loss' needs evaluations; give"),
        (["checkpoint.best=heldout/loss", "eval.every=5", "eval.choices=[x]"], "use one of x/accuracy, x/accuracy_norm"),
        (["checkpoint.best=los", "eval.every=5", "data.heldout=x"], "use one of heldout/loss, heldout/perplexity"),
        (
            [
                "model.rope_scaling={factor: 8, low_freq_factor: 4, high_freq_factor: 4, "
                "original_max_position_embeddings: 512}"
            ],
            "model.rope_scaling.high_freq_factor=4 is not above model.rope_scaling.low_freq_factor=4",
        ),
    ],
)
def test_a_conflict_is_told_with_numbers_and_the_way_out(run_file: Path, settings: list[str], expected: str) -> None:
    lines = problems(run_file, *settings)
    assert any(expected in line for line in lines), "\n".join(lines)


@pytest.mark.parametrize(
    "settings",
    [
        ["optim.warmup_steps=20"],
        ["optim.schedule=wsd", "optim.decay_steps=18"],
        ["data.seq_len=256"],
        ["parallel.micro_batch=8"],
        ["parallel.dp=4"],
        ["parallel.activation_checkpointing=2"],
        ["parallel.tp=4"],
        ["parallel.tp=4", "model.num_key_value_heads=1"],
        ["parallel.cp=4", "data.seq_len=64"],
        ["parallel.cp=2", "parallel.tp=2", "parallel.sequence_parallel=true"],
        ["parallel.sequence_parallel=true", "data.seq_len=63"],
        ["parallel.pp=2", "parallel.stage_layers=[1, 1]"],
        ["parallel.stage_layers=null"],
        ["parallel.schedule=interleaved", "parallel.virtual_stages=2", "parallel.dp=8"],
        ["parallel.schedule=interleaved", "parallel.virtual_stages=2", "model.num_hidden_layers=8", "parallel.pp=4"],
        ["parallel.schedule=zb-h1", "parallel.pp=2", "parallel.gather=step", "data.document_mask=true"],
        ["train.reduce_precision=fp32"],
        ["model.head_dim=32"],
        ["model.num_key_value_heads=4"],
        ["eval.every=5", "data.heldout=x"],
        ["eval.every=5", "data.heldout=x", "checkpoint.best=heldout/loss"],
        ["eval.every=5", "eval.choices=[x]"],
        ["optim.betas=[0, 0]", "optim.grad_clip=0", "optim.weight_decay=0"],
        ["train.precision=bf16", "train.device=cpu"],
    ],
)
def test_what_just_fits_is_accepted(run_file: Path, settings: list[str]) -> None:
    assert load_config(run_file, settings).name == "small"


def test_conflicts_are_found_without_a_file_too() -> None:
    values = yaml.safe_load(MODEL) | {"num_key_value_heads": 3, "vocab": 1}
    with pytest.raises(UserError) as caught:
        build_config(ModelConfig, values, where="config.json")
    assert str(caught.value).split("\n") == [
        "config.json: model.vocab is not a setting; did you mean model.vocab_size?",
        "config.json: model.num_key_value_heads=3 does not divide model.num_attention_heads=4; "
        "use num_key_value_heads in {1, 2, 4}",
    ]
    with pytest.raises(ValidationError, match="does not divide model.num_attention_heads=4"):
        ModelConfig(**(yaml.safe_load(MODEL) | {"num_key_value_heads": 3}))


def test_a_run_built_in_python_is_checked(run_file: Path) -> None:
    values = load_config(run_file).model_dump()
    values["optim"]["warmup_steps"] = 21
    values["data"]["seq_len"] = 1000
    with pytest.raises(ValidationError, match="(?s)warmup_steps=21 exceeds.*seq_len=1000 exceeds"):
        RunConfig.model_validate(values)


# Layouts


def run_with(run_file: Path, **parallel: object) -> RunConfig:
    """A run of 4 heads, 4 key/value heads and 8 layers, laid out freely."""
    run = load_config(run_file, ["model.num_key_value_heads=4", "model.num_hidden_layers=8", "train.global_batch=24"])
    values = run.model_dump()
    values["parallel"].update(parallel)
    return RunConfig.model_validate(values)


INTERLEAVED = {"schedule": "interleaved", "virtual_stages": 2}


@pytest.mark.parametrize(
    ("parallel", "world", "layout", "microbatches"),
    [
        ({}, 1, Layout(1), 12),
        ({}, 4, Layout(4), 3),
        ({}, 12, Layout(12), 1),
        ({"dp": 3}, 3, Layout(3), 4),
        ({"tp": 2, "pp": 3}, 18, Layout(3, 2, 3), 4),
        ({"dp": 2, "tp": 4, "pp": 8}, 64, Layout(2, 4, 8), 6),
        ({"tp": 2, "cp": 2}, 12, Layout(3, 2, 1, 2), 4),
        ({"pp": 4, **INTERLEAVED}, 4, Layout(1, 1, 4), 12),
        ({"pp": 4, **INTERLEAVED}, 8, Layout(2, 1, 4), 12),  # of one sequence each: six would be no multiple of pp
        ({"pp": 2, **INTERLEAVED}, 4, Layout(2, 1, 2), 6),
    ],
)
def test_layouts_that_fit(
    run_file: Path, parallel: dict[str, object], world: int, layout: Layout, microbatches: int
) -> None:
    run = run_with(run_file, **parallel)
    assert fit_layout(run, world) == layout
    assert layout.world == world
    share = run.train.global_batch // layout.dp
    assert share // micro_batch_of(run, layout) == microbatches and share % micro_batch_of(run, layout) == 0


@pytest.mark.parametrize(
    ("parallel", "world", "expected"),
    [
        (
            {},
            5,
            "run small: train.global_batch=24 does not split evenly over 5 replicas; "
            "use train.global_batch=20 or 25, or a world size in {1, 2, 3, 4, 6, 8, 12, 24}; "
            "layouts of 5 ranks that fit: dp=1 tp=1 pp=5 cp=1",
        ),
        (
            {"tp": 2},
            10,
            "train.global_batch=24 does not split evenly over 5 replicas; "
            "use train.global_batch=20 or 25, or a world size in {2, 4, 6, 8, 12, 16, 24, 48}; "
            "layouts of 10 ranks that fit: dp=1 tp=2 pp=5 cp=1, dp=2 tp=1 pp=5 cp=1, dp=1 tp=1 pp=5 cp=2",
        ),
        (
            {"dp": 3},
            4,
            "run small: the world size 4 is not parallel.dp * parallel.tp * parallel.pp * parallel.cp = "
            "3 * 1 * 1 * 1 = 3; start 3 ranks; "
            "layouts of 4 ranks that fit: dp=4 tp=1 pp=1 cp=1, dp=2 tp=2 pp=1 cp=1, dp=2 tp=1 pp=2 cp=1",
        ),
        ({"dp": 2, "tp": 4}, 6, "2 * 4 * 1 * 1 = 8; start 8 ranks; layouts of 6 ranks that fit: dp=3 tp=2 pp=1 cp=1, "
         "dp=6 tp=1 pp=1 cp=1, dp=2 tp=1 pp=3 cp=1"),
        (
            {"tp": 2, "pp": 3},
            16,
            "run small: the world size 16 is not a multiple of parallel.tp * parallel.pp * parallel.cp = "
            "2 * 3 * 1 = 6; start 12 or 18 ranks; "
            "layouts of 16 ranks that fit: dp=2 tp=2 pp=4 cp=1, dp=4 tp=2 pp=2 cp=1, dp=1 tp=2 pp=8 cp=1",
        ),
        (
            {"tp": 2, "pp": 3},
            29,
            "start 24 or 36 ranks; no layout of 29 ranks fits these settings; "
            "of other sizes: dp=2 tp=2 pp=7 cp=1 (28), dp=3 tp=2 pp=5 cp=1 (30), dp=4 tp=2 pp=4 cp=1 (32)",
        ),
        ({"tp": 4}, 2, "start 4 ranks; layouts of 2 ranks that fit: dp=1 tp=2 pp=1 cp=1, dp=2 tp=1 pp=1 cp=1, "
         "dp=1 tp=1 pp=2 cp=1"),
        (
            {"pp": 4, **INTERLEAVED},
            32,
            "run small: parallel.schedule=interleaved needs micro-batches in a multiple of parallel.pp=4, and 3 "
            "sequences for each replica (train.global_batch=24 / dp=8) make none; use train.global_batch=32, or a world "
            "size in {4, 8, 12, 24}, or parallel.schedule=1f1b and virtual_stages=1; layouts of 32 ranks that fit: "
            "dp=2 tp=4 pp=4 cp=1, dp=2 tp=1 pp=4 cp=4, dp=2 tp=2 pp=4 cp=2",
        ),
    ],
)
def test_layouts_that_do_not_fit(run_file: Path, parallel: dict[str, object], world: int, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        fit_layout(run_with(run_file, **parallel), world)
    assert str(caught.value).endswith(expected)


def accepted(run: RunConfig, layout: Layout) -> bool:
    """Whether a run with exactly this layout is read and started."""
    values = run.model_dump()
    values["parallel"].update(asdict(layout))
    try:
        return fit_layout(RunConfig.model_validate(values), layout.world) == layout
    except (UserError, ValidationError):
        return False


def every_layout(world: int) -> list[Layout]:
    sizes = [n for n in range(1, world + 1) if world % n == 0]
    axes = itertools.product(sizes, sizes, sizes, sizes)
    return [layout for layout in itertools.starmap(Layout, axes) if layout.world == world]


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["model.num_key_value_heads=1", "data.seq_len=62", "train.global_batch=6"],
        ["parallel.sequence_parallel=true", "data.seq_len=36", "model.vocab_size=516"],
        ["model.num_attention_heads=12", "model.num_key_value_heads=6", "model.head_dim=8", "model.vocab_size=768"],
        ["parallel.schedule=interleaved", "parallel.virtual_stages=2", "model.num_hidden_layers=6"],
        ["model.num_hidden_layers=6", "parallel.stage_layers=[1, 2, 3]", "parallel.pp=3"],
    ],
    ids=str,
)
def test_the_layouts_named_are_those_that_are_accepted_nearest_first(run_file: Path, changes: list[str]) -> None:
    run = load_config(run_file, ["model.num_hidden_layers=4", *changes])
    for world in (1, 2, 3, 4, 6, 8, 12, 16):
        found = nearest_layouts(settings_of(run), world, at_most=10**6)
        assert len(found) == len(set(found))
        assert set(found) == {layout for layout in every_layout(world) if accepted(run, layout)}
        given = Layout(1, run.parallel.tp, run.parallel.pp, run.parallel.cp)
        pairs = [[(getattr(one, a), getattr(given, a)) for a in ("tp", "pp", "cp")] for one in found]
        moved = [sum(abs(log2(now / before)) for now, before in pair) for pair in pairs]
        assert moved == sorted(moved)
        assert found[:3] == nearest_layouts(settings_of(run), world)


@pytest.mark.parametrize("changes", [["parallel.tp=3"], ["parallel.pp=3"], ["parallel.cp=3", "model.num_hidden_layers=9"]])
def test_the_replicas_named_where_the_world_size_is_open_are_accepted(run_file: Path, changes: list[str]) -> None:
    (line,) = [line for line in problems(run_file, *changes) if "replicas that fit" in line]
    replicas = [[int(number) for number in re.findall(r"=(\d+)", text)] for text in line.rsplit(": ", 1)[1].split(", ")]
    assert len(replicas) == 3
    for tp, pp, cp in replicas:
        fitted = load_config(run_file, [*changes, f"parallel.tp={tp}", f"parallel.pp={pp}", f"parallel.cp={cp}"])
        assert fit_layout(fitted, tp * pp * cp) == Layout(1, tp, pp, cp)


@pytest.mark.parametrize("world", [7, 13, 29])
def test_where_no_layout_fits_the_ones_of_other_sizes_are_accepted(run_file: Path, world: int) -> None:
    run = load_config(run_file)
    assert not any(accepted(run, layout) for layout in every_layout(world))
    with pytest.raises(UserError, match=f"no layout of {world} ranks fits these settings") as caught:
        fit_layout(run, world)
    named = re.findall(r"dp=(\d+) tp=(\d+) pp=(\d+) cp=(\d+) \((\d+)\)", str(caught.value))
    assert len(named) == 3
    for *axes, size in named:
        layout = Layout(*map(int, axes))
        assert layout.world == int(size) and accepted(run, layout)


def test_misfits_beyond_reason_are_told_at_once(run_file: Path) -> None:
    huge = ["model.num_attention_heads=735134400", "model.head_dim=2", "model.num_key_value_heads=735134400"]
    started = time.perf_counter()
    assert problems(run_file, *huge, "parallel.tp=7919", "parallel.pp=999999999", f"train.global_batch={10**9}")
    with pytest.raises(UserError, match="layouts of 735134400 ranks|no layout of 735134400 ranks"):
        fit_layout(load_config(run_file, ["train.global_batch=735134399"]), 735134400)
    assert time.perf_counter() - started < 10


# Writing


def test_a_dump_loads_to_an_equal_run(run_file: Path) -> None:
    overrides = [
        "folder='1e4'",
        "data.tokenizer='yes'",
        "data.heldout='012'",
        "eval.choices=['null', '~', '1:30', '.5', '- a', 'ü', '2024-01-01', '0x1f', '<<', '1_000']",
        "optim.lr=3.0000000000000001e-7",
        "train.seed=9223372036854775807",
        "parallel.dp=2",
        "parallel.activation_checkpointing=2",
        "model.rope_scaling={factor: 8, low_freq_factor: 1, high_freq_factor: 4, original_max_position_embeddings: 64}",
    ]
    run = load_config(run_file, overrides)
    dumped = run_file.parent / "elsewhere" / "config.yaml"
    dumped.parent.mkdir()
    dumped.write_text(dump_config(run), encoding="utf-8")
    assert load_config(dumped) == run
    assert run.eval.choices[0] == "null"


def test_other_yaml_readers_see_the_same_text_in_a_dump(run_file: Path) -> None:
    run = load_config(run_file, ["eval.choices=['yes', '1e4', '012', 'null']"])
    assert yaml.safe_load(dump_config(run))["eval"]["choices"] == ["yes", "1e4", "012", "null"]


# Help


def test_every_setting_has_a_doc_and_says_what_it_takes() -> None:
    settings = {setting.name: setting for setting in list_settings(RunConfig)}
    assert len(settings) >= 60
    assert [name for name, setting in settings.items() if not setting.doc.endswith(".")] == []
    assert settings["train.steps"].default == "required"
    assert settings["parallel.dp"].allowed == "a whole number >= 1 or auto"
    assert settings["data.train.N.weight"].default == "1.0"
    assert settings["model.rope_scaling.factor"].allowed == "a number >= 1"
    assert "relative to this file" in settings["model"].doc


def test_every_section_is_frozen_and_forbids_extras() -> None:
    def sections(tree: type[BaseModel]) -> list[type[BaseModel]]:
        inner = [sections(field.annotation) for field in tree.model_fields.values() if _is_section(field.annotation)]
        return [tree, *(found for group in inner for found in group)]

    found = sections(RunConfig)
    assert len(found) == 9
    assert all(tree.model_config["frozen"] and tree.model_config["extra"] == "forbid" for tree in found)


def _is_section(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def test_a_model_file_loads_alone(run_file: Path) -> None:
    assert load_model_config(run_file.parent / "model.yaml") == load_config(run_file).model


@pytest.mark.parametrize(("world", "setting", "used"), [(1, 2, 2), (8, 2, 1), (2, 5, 4), (24, 16, 1), (1, 100, 24)])
def test_a_micro_batch_is_the_largest_up_to_the_setting_that_divides_the_share(
    run_file: Path, world: int, setting: int, used: int
) -> None:
    run = load_config(run_file, ["train.global_batch=24", f"parallel.micro_batch={setting}"])
    assert micro_batch_of(run, fit_layout(run, world)) == used


def test_aliases_that_multiply_are_refused_at_once(run_file: Path) -> None:
    """Seven lines of ten aliases each stand for ten million values."""
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 8)]
    run_file.write_text("\n".join(lines) + "\n" + run_file.read_text())
    assert any("has more than 10000 values" in line for line in problems(run_file))


def test_a_batch_beyond_reason_is_refused_at_once(run_file: Path) -> None:
    assert any("train.global_batch" in line for line in problems(run_file, f"train.global_batch={10**18}"))
