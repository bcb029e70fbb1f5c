"""How a command ends: what a user did wrong, what ended a run, and what is a defect are told apart."""

from __future__ import annotations

import argparse
import subprocess
import sys
from types import SimpleNamespace

import pytest

from llama_dist import cli
from llama_dist.errors import RunError, UserError


def install(monkeypatch: pytest.MonkeyPatch, outcome: BaseException | int, *, command: str = "sample") -> None:
    """Make `llama-dist sample`, or another command, one that ends with `outcome`."""

    def run(args: argparse.Namespace) -> int:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    module = SimpleNamespace(add_arguments=lambda parser: None, run=run)
    monkeypatch.setitem(cli.COMMANDS, command, "a command of the tests")
    monkeypatch.setitem(sys.modules, f"llama_dist.commands.{command}", module)
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("outcome", "status", "said"),
    [
        (0, 0, ""),
        (75, 75, ""),
        (UserError("x.yaml: a is 1; use 2"), 2, "llama-dist sample: x.yaml: a is 1; use 2\n"),
        (RunError("step 3: loss nan"), 1, "llama-dist sample: step 3: loss nan\n"),
        (KeyboardInterrupt(), 130, "llama-dist sample: interrupted\n"),
    ],
    ids=["done", "stopped", "user", "run", "interrupted"],
)
def test_every_end_has_its_status_and_at_most_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    outcome: BaseException | int,
    status: int,
    said: str,
) -> None:
    install(monkeypatch, outcome)
    assert cli.main(["sample"]) == status
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("name", ["LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID"])
def test_of_the_ranks_of_a_node_the_first_tells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    install(monkeypatch, UserError("no such thing"), command="train")
    for rank, said in (("1", ""), ("0", "llama-dist train: no such thing\n"), ("x", "llama-dist train: no such thing\n")):
        monkeypatch.setenv(name, rank)
        assert cli.main(["train"]) == 2
        assert capsys.readouterr().err == said


def test_a_command_of_one_process_always_tells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, UserError("no such thing"))
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert cli.main(["sample"]) == 2
    assert capsys.readouterr().err == "llama-dist sample: no such thing\n"


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ZeroDivisionError("a defect"))
    with pytest.raises(ZeroDivisionError):
        cli.main(["sample"])


def test_user_errors_are_value_errors_and_run_errors_are_not() -> None:
    assert issubclass(UserError, ValueError) and not issubclass(RunError, ValueError)


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """`llama-dist inspect ... | head -1` ends quietly."""
    process = subprocess.Popen(
        [sys.executable, "-c", SPEAK_MUCH], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "line\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 1


SPEAK_MUCH = """
import sys
from types import SimpleNamespace
from llama_dist import cli

def run(args):
    for _ in range(100_000):
        print("line")
    return 0

cli.COMMANDS["sample"] = ""
sys.modules["llama_dist.commands.sample"] = SimpleNamespace(add_arguments=lambda parser: None, run=run)
sys.exit(cli.main(["sample"]))
"""
