"""What the two READMEs tell one to type works, and prints what they show."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llama_dist.cli import COMMANDS
from llama_dist.config import fit_layout, load_config

REPO = Path(__file__).resolve().parents[2]
MAIN, LAUNCH = REPO / "README.md", REPO / "launch" / "README.md"


def blocks(path: Path, kind: str) -> list[str]:
    """The fenced blocks of a kind: "bash" is run here, "sh" needs a cluster, "" is output."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [block for name, block in fenced if name == kind]


def commands(block: str) -> list[str]:
    return block.replace("\\\n", " ").strip().splitlines()


def is_make(block: str) -> bool:
    return block.startswith("make ")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a clone after `make venv`, with this Python's packages for an environment."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("configs", "launch"):
        shutil.copytree(REPO / name, folder / name)
    for name in ("Makefile", "setup.cfg", "constraints.txt", "pyproject.toml", "README.md"):
        shutil.copy(REPO / name, folder / name)
    programs = folder / ".venv/bin"
    programs.mkdir(parents=True)
    for name in ("python", "python3"):
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (programs / "llama-dist").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m llama_dist "$@"\n')
    (programs / "torchrun").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m torch.distributed.run "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    (programs / "activate").write_text(f"export PATH={shlex.quote(str(programs))}:$PATH\n")
    return folder


def type_in(clone: Path, block: str) -> str:
    """What a shell prints that is given a block, line by line; it must end well."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO), environment.get("PYTHONPATH", "")]))
    environment["CUDA_VISIBLE_DEVICES"] = ""  # a machine may have fewer GPUs than the examples have ranks
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        ["bash", "-euc", f". .venv/bin/activate\n{block}"],
        cwd=clone,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def shape(line: str) -> str:
    """A line with its numbers and the time left taken out: they differ from machine to machine."""
    line = re.sub(r"\b[0-9a-f]{12}\b", "#", line)
    return re.sub(r"\d[\d.,]*(e-?\d+)?[kMG]?(m\d+s|s)?", "#", line)


@pytest.mark.timeout(900)
def test_the_main_readme_runs_in_order_and_prints_what_it_shows(clone: Path) -> None:
    runnable = [block for block in blocks(MAIN, "bash") if not is_make(block)]
    assert len(runnable) >= 2
    printed = [shape(line) for block in runnable for line in type_in(clone, block).splitlines()]
    shown = [line for line in blocks(MAIN, "")[1].splitlines() if line.strip() and line.strip() != "..."]
    assert len(shown) > 10, "the block of output was not found"
    # Generated text depends on the last bit of a processor's arithmetic.
    assert [line for line in shown if shape(line) not in printed and not line.startswith("The cat sat")] == []


@pytest.mark.timeout(600)
def test_the_launch_readme_runs(clone: Path) -> None:
    runnable = blocks(LAUNCH, "bash")
    assert runnable
    if not (clone / "runs/tiny/shards/heldout").is_dir():
        making = [line for line in commands(steps_block()) if re.search(r"corpus|tokenizer|prepare", line)]
        type_in(clone, "\n".join(making))
    losses = []
    for line in (line for block in runnable for line in commands(block)):
        said = type_in(clone, line + " train.steps=4 eval.every=0 checkpoint.every=0")
        losses.append(re.findall(r"loss (\d\.\d{4}) ", said)[:4])
    assert len(losses) == 2 and losses[0] == losses[1] and len(losses[0]) == 4, losses


def steps_block() -> str:
    return next(block for block in blocks(MAIN, "bash") if "tokenizer train" in block)


def test_what_needs_a_cluster_is_at_least_well_formed() -> None:
    lines = [line for block in blocks(LAUNCH, "sh") for line in commands(block) if "llama_dist train" in line]
    assert len(lines) >= 5
    for line in lines:
        config, *overrides = shlex.split(line.split("llama_dist train", 1)[1])
        run = load_config(REPO / config, overrides)
        nodes = re.search(r"--nnodes (\d+)|--nodes (\d+)", line)
        if nodes:
            each = re.search(r"--nproc-per-node (\d+)|--ntasks-per-node (\d+)", line)
            assert each
            assert fit_layout(run, int(nodes[1] or nodes[2]) * int(each[1] or each[2]))


def make_dry(clone: Path, target: str) -> list[str]:
    """The recipe of a target, as a user's shell would have it: the suite itself may run under a make."""
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run(
        ["make", "-n", target], cwd=clone, env=environment, check=True, capture_output=True, text=True
    )
    return done.stdout.splitlines()


def test_make_train_is_made_of_the_steps_that_the_readme_runs(clone: Path) -> None:
    """`make train` itself takes minutes: each line of its recipe is a command tested above, with words that parse."""
    tested = {shlex.split(line)[1] for line in commands(steps_block()) if line.startswith("llama-dist ")} | {"local.sh"}
    found = []
    for line in make_dry(clone, "train"):
        if line.startswith(".venv/bin/llama-dist "):
            name, *words = shlex.split(line)[1:]
            parse(name, words)
            found.append(name)
        elif "launch/local.sh" in line:
            ranks, config, *overrides = shlex.split(line.split("launch/local.sh", 1)[1])
            assert ranks == "auto"
            fit_layout(load_config(REPO / config, overrides), 2)
            found.append("local.sh")
    assert found == ["corpus", "tokenizer", "prepare", "prepare", "local.sh", "generate", "inspect"]
    assert set(found) <= tested


def parse(name: str, words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    importlib.import_module(f"llama_dist.commands.{name}").add_arguments(parser)
    return parser.parse_args(words)


def test_make_test_runs_the_suite(clone: Path) -> None:
    recipe = make_dry(clone, "test")
    assert any(line.endswith("-e '.[test]'") for line in recipe)
    assert recipe[-1].strip() == "OMP_NUM_THREADS=1 .venv/bin/python -m pytest"


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (REPO / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"`make ([a-z]+)`|^make ([a-z]+)$", MAIN.read_text(), flags=re.MULTILINE))
    assert {a or b for a, b in named} <= targets and "train" in targets


def test_every_command_stands_in_the_readme() -> None:
    text = MAIN.read_text()
    assert [name for name in COMMANDS if f"llama-dist {name}" not in text and name != "train"] == []


def test_every_file_that_is_named_exists() -> None:
    for readme in (MAIN, LAUNCH):
        links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", readme.read_text())]
        assert links and all((readme.parent / link).exists() for link in links)
        paths = re.findall(r"`((?:configs|launch|tests|llama_dist|\.ci)/[\w./-]+)`", readme.read_text())
        assert paths and [path for path in paths if not (REPO / path).exists()] == []
