"""What cannot be read is counted, told by file and line, and held to a limit that depends on nothing but the inputs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from data_helpers import small_tokenizer, text_of, write_jsonl

from llama_dist.commands import prepare as command
from llama_dist.data import skips, units
from llama_dist.data.prepare import Node, Prepared, prepare
from llama_dist.data.shards import verify
from llama_dist.data.skips import LineNumbers, SkipLimit
from llama_dist.errors import UserError

UNIT_BYTES = 2000
BAD = {7: b"{broken\n", 30: b'{"body": "x"}\n', 31: b'{"text": "\xff"}\n', 90: b'{"text": ""}\n'}


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """100 lines, of which 3 are bad and one is empty, counted from 1."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("a.jsonl"), [text_of(i) for i in range(100)])
    lines = Path("a.jsonl").read_bytes().splitlines(keepends=True)
    Path("a.jsonl").write_bytes(b"".join(BAD.get(i, line) for i, line in enumerate(lines, 1)))
    return Path("a.jsonl")


def make(source: Path, **settings: Any) -> Prepared:
    return prepare([source], small_tokenizer(), "out", **{"workers": 1, "unit_bytes": UNIT_BYTES, **settings})


def test_too_many_are_refused_with_the_first_of_them(source: Path) -> None:
    for limit in ("0", "2", "0.1%", "3.0%"):  # 3 of 99: 3.03%
        with pytest.raises(UserError) as caught:
            make(source, max_skipped=limit)
        said = str(caught.value)
        assert said.startswith("a.jsonl:7: not valid JSON") and "\n" not in said
        assert f"allowed are {limit}); out.skipped.jsonl lists them; mend them, or raise --max-skipped" in said
    assert "; then a.jsonl:30, a.jsonl:31 (so 3 of 99 documents had to be skipped: 1 column, 1 encoding, 1 json;" in said
    assert "units of the work are done and kept in out.partial" in said
    assert not Path("out").exists()


def test_the_list_of_too_many_is_kept_until_it_went_well(source: Path) -> None:
    source.write_bytes(source.read_bytes() + b'{"text": 1, "' + b"x" * 9000 + b'": [}\n')
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            prepare(["."], small_tokenizer(), "out", workers=1)
        said = str(caught.value)
        assert "out.skipped.jsonl lists them" in said and "4 of 100 documents" in said and len(said) < 500
        assert sorted(path.name for path in Path().iterdir()) == ["a.jsonl", "out.skipped.jsonl"]
    listed = [json.loads(line) for line in Path("out.skipped.jsonl").read_text().splitlines()]
    assert [(item["where"], item["kind"]) for item in listed] == [
        ("a.jsonl:7", "json"), ("a.jsonl:30", "column"), ("a.jsonl:31", "encoding"), ("a.jsonl:101", "json")
    ]  # fmt: skip
    assert listed[1]["reason"].startswith('no string "text"') and "byte" in listed[2]["reason"]
    manifest = prepare(["."], small_tokenizer(), "out", workers=1, max_skipped="4").manifest
    assert [item["file"] for item in manifest.inputs] == ["a.jsonl"], "the list is no input"
    assert sorted(path.name for path in Path().iterdir()) == ["a.jsonl", "out"]


def test_a_list_of_much_is_bounded_and_the_message_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_bytes(b"{broken\n" * 5000)
    with pytest.raises(UserError) as caught:
        prepare(["a.jsonl"], small_tokenizer(), "out", workers=1)
    assert "(so 5,000 of 5,000 documents had" in str(caught.value) and len(str(caught.value)) < 400
    listed = [json.loads(line) for line in Path("out.skipped.jsonl").read_text().splitlines()]
    assert len(listed) == units.SKIPPED_LINES + 1 and listed[-1] == {"more": 5000 - units.SKIPPED_LINES}


@pytest.mark.parametrize("limit", ["3", "3.1%", "100%"])
def test_a_limit_that_allows_them_goes_on_with_what_is_done(source: Path, limit: str) -> None:
    with pytest.raises(UserError, match="a.jsonl:7"):
        make(source)
    before = {path.stat().st_ino for path in Path("out.partial").glob("*/*.bin")}
    manifest = make(source, max_skipped=limit).manifest
    assert before and before <= {path.stat().st_ino for path in Path("out").glob("*.bin")}
    assert manifest.documents == 96
    assert manifest.skipped == {"column": 1, "empty": 1, "encoding": 1, "json": 1}
    assert manifest.command.endswith(f"--max-skipped {limit}")
    listed = [json.loads(line) for line in Path("out/skipped.jsonl").read_text().splitlines()]
    assert [(item["where"], item["kind"]) for item in listed] == [
        ("a.jsonl:7", "json"), ("a.jsonl:30", "column"), ("a.jsonl:31", "encoding")
    ]  # fmt: skip
    verify("out")


def test_the_verdict_is_the_same_for_any_order_of_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first file is all bad, which is hopeless before the end."""
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    Path("in/0.jsonl").write_text("{broken\n" * 400)
    write_jsonl(Path("in/1.jsonl"), [text_of(i) for i in range(100)])

    def refusal(**settings: Any) -> str:
        with pytest.raises(UserError) as caught:
            prepare(["in"], small_tokenizer(), "out", unit_bytes=UNIT_BYTES, max_skipped="1%", **settings)
        listed = Path("out.skipped.jsonl").read_text()
        Path("out.skipped.jsonl").unlink()
        return re.sub(r"; \d+ of \d+ units.*", "", str(caught.value)) + listed

    said = [refusal(workers=1)]
    assert not Path("out.partial/00003").exists(), "it was not stopped early"
    said.append(refusal(workers=1))  # what is done is judged again
    shutil.rmtree("out.partial")
    said += [refusal(workers=2), refusal(workers=2)]
    shutil.rmtree("out.partial")
    said += [refusal(workers=1, node=Node(4, 5))]
    assert set(said) == {said[0]} and "documents in the first " in said[0]
    assert said[0].count('"where": "in/0.jsonl:') == units.SKIPPED_LINES


def test_the_work_is_no_input_of_itself(source: Path) -> None:
    with pytest.raises(UserError, match="a.jsonl:7"):
        prepare(["."], small_tokenizer(), "out", workers=1, unit_bytes=UNIT_BYTES)
    for already_there in (False, True):
        done = prepare(["."], small_tokenizer(), "out", workers=1, unit_bytes=UNIT_BYTES, max_skipped="3")
        assert done.already_there == already_there
        assert [item["file"] for item in done.manifest.inputs] == ["a.jsonl"]


@pytest.mark.parametrize("text", ["", "-1", "1.5", "%", "101%", "a", "0.1 %x"])
def test_a_limit_that_makes_no_sense_is_refused(source: Path, text: str) -> None:
    with pytest.raises(UserError, match="max_skipped=.*: must be a number of documents such as 0, or a share of them"):
        make(source, max_skipped=text)


def test_limits_are_exact() -> None:
    assert SkipLimit("0.1%").allows(1, 1000) and not SkipLimit("0.1%").allows(1, 999)
    assert SkipLimit("0").allows(0, 0) and not SkipLimit("0").allows(1, 10**9)
    assert SkipLimit("100%").allows(5, 5)


def test_the_list_is_bounded_and_says_how_many_more(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "SKIPPED_LINES", 4)
    source.write_bytes(source.read_bytes() + b"{\n" * 50)
    manifest = make(source, max_skipped="90%", unit_bytes=1 << 20).manifest
    assert manifest.skipped["json"] == 51
    listed = [json.loads(line) for line in Path("out/skipped.jsonl").read_text().splitlines()]
    assert [item.get("where") for item in listed] == ["a.jsonl:7", "a.jsonl:30", "a.jsonl:31", "a.jsonl:101", None]
    assert listed[-1] == {"more": 49}


def test_lines_are_told_up_to_an_amount_of_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a@5.jsonl"
    path.write_bytes(b"x\n" * 1000)
    numbers = LineNumbers()
    assert [numbers.tell(f"{path}@{at}") for at in (0, 10, 1000)] == [f"{path}:{n}" for n in (1, 6, 501)]
    assert numbers.tell(f"{path}:7") == f"{path}:7"
    monkeypatch.setattr(skips, "LINE_BYTES", 100)
    numbers = LineNumbers()
    assert numbers.tell(f"{path}@90") == f"{path}:46"
    assert numbers.tell(f"{path}@1000") == f"{path}@1000"
    assert numbers.tell(f"{path}@98") == f"{path}:50"


def test_the_command_tells_what_was_skipped(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = command.argparse.ArgumentParser()
    command.add_arguments(parser)
    words = f"a.jsonl --tokenizer {small_tokenizer()} --out out --workers 1 --max-skipped 5%".split()
    assert command.run(parser.parse_args(words)) == 0
    said = capsys.readouterr()
    assert "Skipped documents: 1 column, 1 empty, 1 encoding, 1 json; see out/skipped.jsonl." in said.err
    assert "96 documents" in said.out
    with pytest.raises(UserError, match="--node-rank and --num-nodes belong together"):
        command.run(parser.parse_args([*words, "--node-rank", "1"]))


MEASURE = """
import resource, sys
from llama_dist.data.prepare import prepare
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
prepare([sys.argv[1]], sys.argv[2], "small", workers=1)
before = peak()
prepare([sys.argv[3]], sys.argv[2], "large", workers=1, unit_bytes=1 << 30)
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in kB on Linux")
def test_memory_does_not_grow_with_the_input(tmp_path: Path, repo: Path) -> None:
    """One unit of half a million lines, more than 30 MB, of which some are long and some are broken."""
    write_jsonl(tmp_path / "small.jsonl", [text_of(i) for i in range(5000)])
    line = json.dumps({"text": "the cat sat on a mat and then it ran"}) + "\n"
    long = json.dumps({"text": text_of(1, words=20_000)}) + "\n"
    (tmp_path / "large.jsonl").write_text((line * 100_000 + long * 2 + "{broken\n") * 5)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, "small.jsonl", str(small_tokenizer()), "large.jsonl"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(repo)}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert int(done.stdout) < 30, f"{done.stdout} MiB more"
