"""The table of bubbles: what the command prints, and that README has just that."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

OPENING, CLOSING = "<!-- bubbles -->\n", "<!-- /bubbles -->"


@pytest.fixture(scope="module")
def printed(repo: Path) -> str:
    done = subprocess.run(
        [sys.executable, "benchmarks/bubbles.py"],
        cwd=repo, env=os.environ | {"PYTHONPATH": str(repo)}, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def bubbles(repo: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command in this process: its status, given its arguments."""
    main = runpy.run_path(str(repo / "benchmarks/bubbles.py"))["main"]

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["bubbles.py", *arguments])
        return main()

    return run


def rows_of(printed: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line[:1] == "|"]


def test_theory_and_clock_agree_in_every_cell(printed: str) -> None:
    header, _, *rows = rows_of(printed)
    assert len(rows) == 15 and all(len(row) == len(header) == 8 for row in rows)
    cells = [cell for row in rows for cell in row[3:]]
    pairs = [pair for cell in cells if (pair := re.fullmatch(r"(\d+\.\d) / (\d+\.\d)", cell))]
    assert len(pairs) == 73 and cells.count("-") == 2  # interleaved: 4 micro-batches do not divide over 8 ranks
    assert all(pair[1] == pair[2] for pair in pairs)


def test_some_cells_are_those_of_the_papers(printed: str) -> None:
    rows = {(row[0], row[1]): row[2:] for row in rows_of(printed)}
    assert rows["gpipe", "4"] == ["64", *(f"{x} / {x}" for x in ("75.0", "37.5", "18.8", "9.4", "4.7"))]
    assert rows["1f1b", "4"] == ["4", *rows["gpipe", "4"][1:]]
    assert rows["interleaved, 2 virtual stages", "4"][:2] == ["5.5", "37.5 / 37.5"]  # half of it
    assert rows["zb-h1", "4"][:2] == ["4", "25.0 / 25.0"]  # a third of it, and no more held


def test_write_replaces_the_block_and_nothing_else(
    bubbles: Callable[..., int], tmp_path: Path, printed: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "page.md"
    path.write_text(f"before\n{OPENING}old\n{CLOSING}\nafter\n", encoding="utf-8")
    for _ in range(2):  # the second time it finds its own table
        assert bubbles("--write", str(path)) == 0
        assert path.read_text(encoding="utf-8") == f"before\n{OPENING}{printed}{CLOSING}\nafter\n"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("text", ["none\n", OPENING, f"{CLOSING}\n{OPENING}", f"{OPENING}{OPENING}{CLOSING}\n"])
def test_a_file_without_a_place_for_it_is_left_as_it_is(
    bubbles: Callable[..., int], tmp_path: Path, text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "page.md"
    path.write_text(text, encoding="utf-8")
    assert bubbles("--write", str(path)) == 2
    assert path.read_text(encoding="utf-8") == text
    told = capfd.readouterr().err
    assert told.startswith(f"{path}: no place for the table; ") and told.count("\n") == 1


def test_the_readme_has_the_table_that_the_command_prints(repo: Path, printed: str) -> None:
    readme = (repo / "README.md").read_text(encoding="utf-8")
    block = re.search(f"{OPENING}(.*?){CLOSING}", readme, flags=re.DOTALL)
    assert block and block[1] == printed, "stale; run python benchmarks/bubbles.py --write README.md"
