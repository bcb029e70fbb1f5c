"""The command line as a user meets it: help that is fast, and one clear line for whatever is wrong."""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from checkpoint_helpers import pieces_of, saved_layout
from data_helpers import make_shards, small_tokenizer

from llama_dist import cli
from llama_dist.checkpoint.places import LocalPlace
from llama_dist.checkpoint.saving import save_checkpoint
from llama_dist.checkpoint.store import Position
from llama_dist.config import RunConfig, load_config
from llama_dist.data.vocabulary import train_tokenizer
from llama_dist.layout import Layout
from llama_dist.model.init import init_
from llama_dist.model.llama import Llama

RUN = """\
name: small
folder: run
model: {vocab_size: 340, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2,
        max_position_embeddings: 128}
data:
  tokenizer: small.model
  train: [{shards: shards}]
  heldout: shards
  seq_len: 32
optim: {lr: 1e-3}
train: {steps: 2, global_batch: 4, device: cpu}
eval: {choices: [choices.jsonl], max_samples: 2}
"""
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that a run needs, a checkpoint among it, to be copied by each test."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(make_shards(folder / "made"), folder / "shards")
    shutil.copy(small_tokenizer(), folder / "small.model")
    train_tokenizer((f"other words {i} " * 40 for i in range(30)), vocab_size=290, out=folder / "other.model")
    question = {"context": "the ", "choices": ["cat", "dog"], "answer": 0}
    (folder / "choices.jsonl").write_text(json.dumps(question) + "\n")
    (folder / "run.yaml").write_text(RUN)
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes(b"first\nsecond caf\xe9\n")
    (folder / "nothing").mkdir()
    save_model(folder / "saved", load_config(folder / "run.yaml"))
    return folder


def save_model(folder: Path, run: RunConfig) -> None:
    """A run folder with one checkpoint of freshly drawn weights."""
    model = Llama(run.model)
    init_(model, run.model, seed=0)
    saved = saved_layout(run.model, Layout(1), states=("",))
    pieces = pieces_of({name: parameter.detach() for name, parameter in model.named_parameters()}, saved)
    config = run.model_dump(mode="json")
    state = {"layout": saved.to_json(), "config": config, "versions": {}, "data_fingerprint": "x"}
    place = LocalPlace(folder / "checkpoints")
    save_checkpoint(place, Position(1, 4), pieces, state=state, attempt=1, group=None)


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of those files as the working directory of a process that no launcher started."""
    shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    # A run in this process writes its launcher's contract into the environment, and gives the log a file.
    monkeypatch.setattr(os, "environ", {key: value for key, value in os.environ.items() if key not in LAUNCHER})
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    return tmp_path / "work"


def tree(folder: Path) -> dict[str, str]:
    """Every path below `folder` with the hash of what it holds."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): sha256(p.read_bytes()).hexdigest() if p.is_file() else "" for p in paths}


def call(*argv: str) -> int | None:
    try:
        return cli.main(argv)
    except SystemExit as end:  # argparse
        assert isinstance(end.code, int)
        return end.code


def test_the_files_of_these_tests_are_good(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What fails below fails for the reason that the test gives, and for no other."""
    assert call("eval", "saved", "--json") == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert results["heldout"]["loss"] == pytest.approx(5.83, abs=0.1)  # of 340 equally likely tokens
    assert results["choices.jsonl"]["items"] == 1
    assert call("generate", "the cat", "--checkpoint", "saved", "--max-new-tokens", "3") == 0
    assert capsys.readouterr().out.startswith("the cat")
    assert call("inspect", "saved/checkpoints/step-00000001") == 0
    assert "whole, every checksum right" in capsys.readouterr().out


def damage_checkpoint(here: Path) -> None:
    file = here / "saved/checkpoints/step-00000001/rank-00000.bin"
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)


def cut_manifest(here: Path) -> None:
    file = here / "saved/checkpoints/step-00000001/MANIFEST.json"
    file.write_text(file.read_text()[:100])


def age_checkpoint(here: Path) -> None:
    """As if a later version had written it."""
    file = here / "saved/checkpoints/step-00000001/MANIFEST.json"
    body = json.loads(file.read_text())
    file.write_text(json.dumps({**body, "format": 99, "versions": {"llama_dist": "9.9"}}))


def cut_shards(here: Path) -> None:
    file = here / "shards/00000.bin"
    file.write_bytes(file.read_bytes()[:-7])


def remove_manifest(here: Path) -> None:
    (here / "shards/MANIFEST.json").unlink()


def break_choices(here: Path) -> None:
    (here / "choices.jsonl").write_text('{"context": "x"}\n')


def three_ranks(here: Path) -> None:
    os.environ.update(RANK="0", WORLD_SIZE="3", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")


def odd_rank(here: Path) -> None:
    os.environ.update(RANK="one", WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")


TRAIN_TOKENIZER = "tokenizer train latin.txt --vocab-size 300 --out new.model"
PREPARE = "prepare empty.txt --tokenizer small.model --out new"
MISTAKES: list[tuple[str, str]] = [
    # training: the config
    ("train absent.yaml", r"absent.yaml: there is no such file"),
    ("train rum.yaml", r"rum.yaml: there is no such file; did you mean run.yaml\?"),
    ("train run.yaml train.step=5", r"override 'train.step=5': train.step is not a setting.*did you mean train.steps"),
    ("train run.yaml optim.lr=fast", r"optim.lr.*'fast'.*a number > 0"),
    ("train run.yaml steps", r"override 'steps': is not of the form section.key=value"),
    ("train run.yaml parallel.tp=2", r"is not a multiple .*; start 2 ranks; layouts of 1 rank that fit: dp=1 tp=1 pp=1"),
    ("train run.yaml parallel.pp=3", r"parallel.pp=3 exceeds model.num_hidden_layers=2; use pp <= 2"),
    # training: the machine
    ("train run.yaml parallel.dp=2", r"the world size 1 is not parallel.dp.* = 2; start 2 ranks"),
    # training: the data
    ("train run.yaml data.tokenizer=other.model", r"shards: was made with another tokenizer: .*small.model"),
    ("train run.yaml data.tokenizer=none.model", r"none.model"),
    ("train run.yaml model.vocab_size=200", r"model.vocab_size=200: .*go up to 339; use at least 340"),
    ("train run.yaml data.train.0.shards=none", r"none: there is no such shard directory"),
    ("train run.yaml data.heldout=none", r"none: there is no such shard directory"),
    ("train run.yaml eval.choices=[none.jsonl]", r"none.jsonl: cannot be read"),
    (
        "train run.yaml data.seq_len=9999 model.max_position_embeddings=9999",
        r"tokens are fewer than the 10000 of one sample",
    ),
    # training: the checkpoints that are there
    ("train run.yaml folder=saved train.seed=5", r"saved by a run with another config; .*train.seed: 0 then, 5 now"),
    # data
    (TRAIN_TOKENIZER, r"latin.txt:2: byte 16 of the file \(0xe9\) is not UTF-8"),
    (TRAIN_TOKENIZER.replace("latin", "empty"), r"empty.txt: no documents with text"),
    ("tokenizer train run.yaml --vocab-size 300 --out new.model", r"run.yaml: is not a kind of file"),
    ("tokenizer train made/texts-0.jsonl --vocab-size 90000 --out new.model", r"vocab_size=90000: .* at most"),
    (PREPARE, r"empty.txt: no documents with text"),
    (PREPARE.replace("empty.txt", "latin.txt"), r"latin.txt:2: byte 16"),
    (PREPARE.replace("empty.txt", "absent.txt"), r"absent.txt: there is no such file"),
    (PREPARE.replace("small.model", "none.model"), r"none.model: there is no such"),
    (PREPARE.replace("small.model", "run.yaml"), r"run.yaml"),
    ("prepare made/texts-0.jsonl --tokenizer small.model --out saved", r"saved: is there and is not a shard"),
    ("corpus saved", r"saved: is there and is not a whole corpus"),
    ("corpus new --max-mb 0.001", r"max_bytes=1000: is too little"),
    # what was trained
    ("generate hello --checkpoint absent", r"absent: there is no such folder"),
    ("generate hello --checkpoint nothing", r"nothing: holds no checkpoint"),
    ("generate hello --checkpoint saved --tokenizer none.model", r"none.model"),
    ("generate hello --checkpoint saved --temperature -1", r"generate: temperature is -1.0; allowed"),
    ("generate hello --checkpoint saved --top-p 2", r"generate: top_p is 2.0; allowed"),
    (
        "generate hello --checkpoint saved --max-new-tokens 500",
        r"500 new ones are asked for, but the model has 128 positions",
    ),
    ("eval absent", r"absent: there is no such folder"),
    ("eval nothing", r"nothing: holds no checkpoint"),
    ("eval saved --heldout none", r"none: there is no such shard directory"),
    ("eval saved --choices none.jsonl", r"none.jsonl: cannot be read"),
    ("eval saved --batch 0", r"eval.batch"),
    ("inspect absent", r"absent: there is no such folder"),
    ("inspect nothing", r"nothing: is neither a run folder"),
    ("settings optim.speed", r"optim.speed: there is no such setting"),
    ("settings lr", r"lr: there is no such setting or section; did you mean optim.lr\?"),
]
DAMAGE: list[tuple[Callable[[Path], None], str, str]] = [
    (
        three_ranks,
        "train run.yaml",
        r"global_batch=4 does not split evenly over 3 replicas; use .*a world size in \{1, 2, 4\}",
    ),
    (odd_rank, "train run.yaml", r"environment: RANK='one' is not a whole number"),
    (break_choices, "train run.yaml", r"choices.jsonl:1: is not a multiple-choice item"),
    (cut_shards, "train run.yaml", r"shards/00000.bin"),
    (remove_manifest, "train run.yaml", r"shards: has no MANIFEST.json"),
    (
        damage_checkpoint,
        "train run.yaml folder=saved",
        r"none of its 1 checkpoints verifies, and a run with checkpoints is never",
    ),
    (
        damage_checkpoint,
        "generate hello --checkpoint saved",
        r"none of its 1 checkpoints verifies.*xxh3-128 is \w+, expected \w+",
    ),
    (age_checkpoint, "train run.yaml folder=saved", r"none of its 1 checkpoints .*format 99, written by llama_dist 9.9"),
    (age_checkpoint, "generate hello --checkpoint saved", r"format 99, written by llama_dist 9.9; this version reads"),
    (age_checkpoint, "inspect saved/checkpoints/step-00000001", r"format 99, written by llama_dist 9.9"),
    (damage_checkpoint, "eval saved/checkpoints/step-00000001", r"step-00000001: is damaged: .*rank-00000.bin"),
    (
        cut_manifest,
        "eval saved/checkpoints/step-00000001",
        r"step-00000001: is damaged: .*MANIFEST.json: cannot be read",
    ),
    (damage_checkpoint, "inspect saved/checkpoints/step-00000001", r"is damaged: .*rank-00000.bin: xxh3-128"),
    (cut_shards, "inspect shards", r"shards/00000.bin"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=[words for words, _ in MISTAKES])
def test_a_mistake_is_one_line_with_status_2_and_changes_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    check_refusal(here, capsys, words, message)


@pytest.mark.parametrize(("change", "words", "message"), DAMAGE, ids=[f"{c.__name__}: {w}" for c, w, _ in DAMAGE])
def test_damage_is_one_line_too(
    here: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], None], words: str, message: str
) -> None:
    change(here)
    check_refusal(here, capsys, words, message)


def check_refusal(here: Path, capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    before = tree(here)
    assert call(*words.split()) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and said.err.startswith(f"llama-dist {words.split()[0]}: "), said.err
    assert re.search(message, said.err), said.err
    assert "Traceback" not in said.err + said.out and "Error(" not in said.err
    after = tree(here)
    # What a run complains of once it has begun to read stands in its folder's log as well, and what cannot be read of
    # texts beside the output.
    told = r"run$|(run|saved)/(logs|LOCK)|new\.skipped\.jsonl$"
    assert {path: content for path, content in after.items() if not re.match(told, path)} == before


def test_every_problem_of_a_config_has_its_own_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "bad.yaml").write_text(RUN.replace("steps: 2", "stepz: 2").replace("lr: 1e-3", "lr: -1"))
    assert call("train", "bad.yaml", "parallel.zero=4") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4  # stepz is unknown, steps is missing
    for part in ("stepz", "train.steps", "optim.lr", "parallel.zero"):
        assert any(part in line for line in lines), part
    assert sum("bad.yaml:" in line for line in lines) == 3


@pytest.mark.parametrize("words", ["trian", "--nonsense", "train", "tokenizer", "generate", "eval a b"])
def test_wrong_words_show_the_usage_with_status_2(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("usage: llama-dist") and "Traceback" not in error


def run_process(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
    repo = Path(cli.__file__).resolve().parents[1]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(repo), environment.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "llama_dist", *argv]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_a_mistake_in_a_real_process(here: Path) -> None:
    before = tree(here)
    ended = run_process("train", "run.yaml", "data.tokenizer=other.model", cwd=here)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("llama-dist train: shards: was made with another tokenizer")
    assert ended.stderr.count("\n") == 1
    assert tree(here) == before


@pytest.mark.parametrize("argv", [["--help"], [], ["--version"], ["settings", "train"], ["corpus", "--help"]], ids=str)
def test_what_needs_no_torch_is_fast(argv: list[str], tmp_path: Path) -> None:
    def seconds() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = seconds()
    ended = run_process(*argv, cwd=tmp_path)
    assert ended.returncode == 0 and ended.stdout
    assert seconds() - before < 2.0  # of the processor: the machine may be busy with something else
    check = "import sys; from llama_dist import cli\ntry: cli.main(sys.argv[1:])\nexcept SystemExit: pass\n"
    check += "assert not {'torch', 'deepspeed'} & set(sys.modules), 'imports too much'"
    subprocess.run([sys.executable, "-c", check, *argv], check=True, capture_output=True, timeout=120)


def test_what_the_deepspeed_launcher_adds_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--local_rank=3", "settings", "optim.lr") == 0
    assert "optim.lr (required)" in capsys.readouterr().out


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert call() == 0
    overview = capsys.readouterr().out
    for name, text in cli.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(text)}$", overview, flags=re.MULTILINE)
    modules = {p.stem.removesuffix("_") for p in (Path(cli.__file__).parent / "commands").glob("*.py")} - {"__init_"}
    assert modules == set(cli.COMMANDS)


@pytest.mark.parametrize("command", [*cli.COMMANDS, "tokenizer train"])
def test_help_reads_well(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*command.split(), "--help") == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: llama-dist {command}")
    assert max(map(len, text.splitlines())) <= 130
    if command != "tokenizer":  # its one action says it all
        assert re.search(rf"^examples?:\n  llama-dist {command}", text, flags=re.MULTILINE)
    description = text.split("\n\n")[1]
    assert len(description) > 15 and description[0].isupper() and description.rstrip().endswith((".", ":"))
