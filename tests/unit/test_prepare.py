"""Preparing: the same result for any number of workers, whole or not at all, never over something else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from data_helpers import small_tokenizer, text_of, write_jsonl

from llama_dist.data import prepare as module
from llama_dist.data.prepare import prepare
from llama_dist.data.shards import Shards, load_manifest, verify
from llama_dist.data.tokenizer import load_tokenizer
from llama_dist.data.vocabulary import train_tokenizer
from llama_dist.errors import UserError


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "MANIFEST.json"}


def test_any_number_of_workers_writes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 2000)
    inputs = [write_jsonl(tmp_path / f"{k}.jsonl", [text_of(i) for i in range(100 * k, 100 * k + 60)]) for k in (0, 1)]
    for workers in (1, 2, 3):
        prepare(inputs, small_tokenizer(), tmp_path / f"out{workers}", workers=workers, pair_tokens=5000)
    first = content(tmp_path / "out1")
    assert len(first) > 2
    for workers in (2, 3):
        assert content(tmp_path / f"out{workers}") == first
        manifest = load_manifest(tmp_path / f"out{workers}")
        assert replace(manifest, command="") == replace(load_manifest(tmp_path / "out1"), command="")
    verify(tmp_path / "out3")


def test_documents_are_bos_ids_eos(tmp_path: Path) -> None:
    prepare([write_jsonl(tmp_path / "a.jsonl", ["the cat", "a hat"])], small_tokenizer(), tmp_path / "out", workers=1)
    tokenizer, shards = load_tokenizer(small_tokenizer()), Shards(tmp_path / "out")
    for i, text in enumerate(("the cat", "a hat")):
        assert shards.document(i).tolist() == [1, *tokenizer.encode(text), 2]


def test_without_a_bos_documents_only_end(shared_data: Path, tmp_path: Path) -> None:
    gpt2 = shared_data / "tokenizers/gpt2_tokenizer.json"
    source = write_jsonl(tmp_path / "a.jsonl", ["the <|endoftext|> cat"])
    prepare([source], gpt2, tmp_path / "out", workers=1)
    document = Shards(tmp_path / "out").document(0).tolist()
    assert document == [*load_tokenizer(gpt2).encode("the <|endoftext|> cat"), 50256]
    assert document.count(50256) == 1


def test_again_with_the_same_is_no_work_and_with_another_is_refused(tmp_path: Path) -> None:
    source, out = write_jsonl(tmp_path / "a.jsonl", [text_of(1)]), tmp_path / "out"
    first = prepare([source], small_tokenizer(), out, workers=1)
    stamp = (out / "MANIFEST.json").stat().st_mtime_ns
    again = prepare([source], small_tokenizer(), out, workers=2)
    assert (first.already_there, again.already_there) == (False, True)
    assert again.manifest == first.manifest and (out / "MANIFEST.json").stat().st_mtime_ns == stamp

    other = write_jsonl(tmp_path / "b.jsonl", [text_of(2)])
    with pytest.raises(UserError, match="out: holds shards of other inputs"):
        prepare([other], small_tokenizer(), out, workers=1)
    train_tokenizer([text_of(i) for i in range(9)], vocab_size=300, out=tmp_path / "other.model")
    with pytest.raises(UserError, match="out: holds shards of another tokenizer"):
        prepare([source], tmp_path / "other.model", out, workers=1)
    (out / "00000.bin").write_bytes(b"")
    with pytest.raises(UserError, match="00000.bin: is cut short"):
        prepare([source], small_tokenizer(), out, workers=1)


def test_what_is_there_is_not_written_over(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [text_of(1)])
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious.txt").write_text("mine")
    for taken in (tmp_path / "full", source):
        with pytest.raises(UserError, match="is not a shard directory; remove it first, or choose another --out"):
            prepare([source], small_tokenizer(), taken, workers=1)
    assert (tmp_path / "full/precious.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    prepare([source], small_tokenizer(), tmp_path / "empty", workers=1)
    assert Shards(tmp_path / "empty").num_documents == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_on_the_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 500)
    source = write_jsonl(tmp_path / "a.jsonl", [text_of(i) for i in range(30)])
    source.write_bytes(source.read_bytes() + b"{broken\n")
    with pytest.raises(UserError, match="a.jsonl:31: not valid JSON"):
        prepare([source], small_tokenizer(), tmp_path / "deep/out", workers=workers)
    assert list((tmp_path / "deep").iterdir()) == []


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_nothing_to_prepare(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(UserError, match="no documents with text"):
        prepare([write_jsonl(tmp_path / "a.jsonl", texts)], small_tokenizer(), tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


def test_workers_must_be_some(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="workers=0"):
        prepare([write_jsonl(tmp_path / "a.jsonl", ["a"])], small_tokenizer(), tmp_path / "out", workers=0)


def test_a_worker_that_dies_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 500)
    monkeypatch.setattr(module, "_encode_in_worker", die)
    source = write_jsonl(tmp_path / "a.jsonl", [text_of(i) for i in range(30)])
    with pytest.raises(UserError, match="a worker process died.*fewer --workers"):
        prepare([source], small_tokenizer(), tmp_path / "out", workers=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


def die(path: str, texts: list[str]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_ctrl_c_leaves_nothing(tmp_path: Path, repo: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [text_of(i, words=2000) for i in range(3000)])
    program = (
        "import sys; from llama_dist.data.prepare import prepare\n"
        "if __name__ == '__main__': prepare([sys.argv[1]], sys.argv[2], sys.argv[3], workers=2)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(source), str(small_tokenizer()), str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": str(repo)},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    started_at = time.monotonic()
    while not list(tmp_path.glob("out.partial-*/00000.bin")) and process.poll() is None:
        assert time.monotonic() - started_at < 60, "no work was begun"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and b"KeyboardInterrupt" in errors
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]
