"""The commands of the data layer, through their parsers: what they make, say and refuse."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType

import pytest
from data_helpers import small_tokenizer, text_of, write_jsonl

from llama_dist.commands import corpus, prepare, tokenizer
from llama_dist.data.shards import Shards
from llama_dist.errors import UserError


def call(command: ModuleType, *words: str | Path) -> int:
    return int(command.run(parser_of(command).parse_args([str(word) for word in words])))


def parser_of(command: ModuleType) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llama-dist x")
    command.add_arguments(parser)
    return parser


def test_from_nothing_to_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(corpus, tmp_path / "c", "--max-mb", "0.4") == 0
    said = capsys.readouterr().out
    assert "c: made, from the standard library of CPython" in said and "questions of four choices" in said
    model = tmp_path / "t.model"
    train = ("train", tmp_path / "c/train.jsonl", "--vocab-size", "500", "--out", model)
    assert call(tokenizer, *train) == 0
    assert "t.model: made, 500 pieces" in capsys.readouterr().out
    shards = ("--tokenizer", model, "--out", tmp_path / "s", "--workers", "1")
    assert call(prepare, tmp_path / "c/train.jsonl", *shards) == 0
    said = capsys.readouterr().out
    assert f"{Shards(tmp_path / 's').num_tokens:,} tokens" in said and "unigram entropy" in said

    assert call(corpus, tmp_path / "c", "--max-mb", "0.4") == 0
    assert "c: is there already" in capsys.readouterr().out
    assert call(tokenizer, *train) == 0
    assert "t.model: is there already" in capsys.readouterr().out
    assert call(prepare, tmp_path / "c/train.jsonl", *shards) == 0
    assert "there already; nothing was done" in capsys.readouterr().out


def bad_calls(folder: Path) -> dict[str, tuple[ModuleType, tuple[str | Path, ...], str]]:
    good = write_jsonl(folder / "in/good.jsonl", [text_of(i) for i in range(5)])
    (folder / "in/bad.txt").write_bytes(b"ab\xff")
    (folder / "in/empty.txt").write_bytes(b"")
    model = small_tokenizer()
    out = folder / "out/x"
    return {
        "missing": (prepare, (folder / "absent.txt", "--tokenizer", model, "--out", out), "absent.txt: there is no"),
        "utf8": (prepare, (folder / "in/bad.txt", "--tokenizer", model, "--out", out), "bad.txt:1: byte 2"),
        "empty": (prepare, (folder / "in/empty.txt", "--tokenizer", model, "--out", out), "no documents with text"),
        "no tokenizer": (prepare, (good, "--tokenizer", folder / "t.model", "--out", out), "no such tokenizer file"),
        "not a tokenizer": (prepare, (good, "--tokenizer", good, "--out", out), "not a sentencepiece model"),
        "workers": (prepare, (good, "--tokenizer", model, "--out", out, "--workers", "0"), "workers=0"),
        "vocabulary": (tokenizer, ("train", good, "--vocab-size", "9999", "--out", out), "vocab_size=9999: .* at most"),
        "train missing": (tokenizer, ("train", folder / "absent.txt", "--vocab-size", "300", "--out", out), "absent"),
        "train empty": (tokenizer, ("train", folder / "in/empty.txt", "--vocab-size", "300", "--out", out), "no docum"),
        "train utf8": (tokenizer, ("train", folder / "in/bad.txt", "--vocab-size", "300", "--out", out), "bad.txt:1"),
        "corpus": (corpus, (out, "--max-mb", "0.001"), "max_bytes=1000"),
    }


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    for name, (command, words, message) in bad_calls(tmp_path).items():
        with pytest.raises(UserError, match=message) as caught:
            call(command, *words)
        assert "\n" not in str(caught.value), name
        for left in (tmp_path / "out").iterdir():  # a list of what cannot be read, where it is that
            assert left.name == "x.skipped.jsonl" and f"{left} lists them" in str(caught.value), name
            left.unlink()


@pytest.mark.parametrize("command", [corpus, prepare, tokenizer])
def test_wrong_words_exit_with_2(command: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        call(command, "--nonsense")
    assert caught.value.code == 2 and "usage: llama-dist x" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "words"), [(corpus, []), (prepare, []), (tokenizer, ["train"])])
def test_help_has_an_example_that_parses(
    command: ModuleType, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        call(command, *words, "--help")
    assert caught.value.code == 0
    examples = [line.split() for line in capsys.readouterr().out.split("\n") if line.startswith("  llama-dist ")]
    assert examples
    for example in examples:
        assert example[1] == command.__name__.rsplit(".", 1)[1]
        parser_of(command).parse_args(example[2:])
