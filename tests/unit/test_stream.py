"""A stream: its order is a function of the position and the text, whenever that comes and whoever was killed."""

from __future__ import annotations

import json
import multiprocessing
import re
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import make_shards, small_tokenizer, text_of, write_jsonl

from llama_dist.config import load_config
from llama_dist.config_data import DataConfig, Source, StreamSource
from llama_dist.data import spool_writer
from llama_dist.data.claims import Claims
from llama_dist.data.loader import Loader
from llama_dist.data.samples import Concatenated
from llama_dist.data.shards import Shards, load_manifest, verify
from llama_dist.data.spool import jobs_of, spooling
from llama_dist.data.spool_writer import SpoolJob, write_spool
from llama_dist.data.stream import END, ERROR, WANTED, Spools, Stream, identity_of, spelled, spool_of
from llama_dist.data.tokenizer import fingerprint_of, load_tokenizer
from llama_dist.errors import RunError, UserError

SEQ_LEN, WINDOW, DOCUMENTS = 16, 32, 120


class Enough(Exception):
    """Stands for the end of a process that has written enough."""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of some documents, so that a small text has many."""
    monkeypatch.setattr(spool_writer, "FIRST_PAIR", 400)
    monkeypatch.setattr(spool_writer, "BATCH_CHARACTERS", 1000)
    monkeypatch.setattr(spool_writer, "PART_BYTES", 10_000)
    monkeypatch.setattr(spool_writer, "AHEAD", 1000)


def config(path: Path, **settings: object) -> DataConfig:
    stream = StreamSource(path=str(path), window=WINDOW, **settings)
    return DataConfig(tokenizer=str(small_tokenizer()), train=[Source(stream=stream)], seq_len=SEQ_LEN)


def job_of(path: Path, folder: Path, **settings: object) -> SpoolJob:
    data = config(path, **settings)
    (job,) = jobs_of(data, fingerprint=fingerprint_of(data.tokenizer), folder=folder, logs=folder / "logs")
    return job


def enough() -> None:
    raise Enough


def write_all(job: SpoolJob) -> None:
    (job.folder / WANTED).mkdir(parents=True, exist_ok=True)
    (job.folder / WANTED / f"{10**12:016d}").touch()
    write_spool(job, pause=enough)


def write_some(job: SpoolJob, tokens: int) -> None:
    (job.folder / WANTED).mkdir(parents=True, exist_ok=True)
    (job.folder / WANTED / f"{tokens:016d}").touch()
    with pytest.raises(Enough):
        write_spool(job, pause=enough)


def open_stream(job: SpoolJob, *, wait_seconds: float = 0.5) -> Stream:
    return Stream(job.folder, SEQ_LEN, window=WINDOW, wait_seconds=wait_seconds)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "text.jsonl", [text_of(i) for i in range(DOCUMENTS)])


def tokens_of(texts: list[str]) -> np.ndarray:
    return load_tokenizer(small_tokenizer()).encode_batch(texts, bos_eos=True)[0]


def test_a_spool_is_a_shard_directory_of_the_text_in_order(small: None, text: Path, tmp_path: Path) -> None:
    job = job_of(text, tmp_path / "stream")
    write_all(job)
    verify(job.folder)
    shards, expected = Shards(job.folder), tokens_of([text_of(i) for i in range(DOCUMENTS)])
    assert np.array_equal(shards.tokens(0, shards.num_tokens), expected)
    assert shards.num_documents == DOCUMENTS
    manifest = load_manifest(job.folder)
    assert END in manifest.files and len(manifest.files) > 10
    assert manifest.raw_bytes == sum(len(text_of(i)) for i in range(DOCUMENTS))
    share = np.bincount(expected) / len(expected)
    assert manifest.unigram_entropy == pytest.approx(-(share[share > 0] * np.log(share[share > 0])).sum())
    before = {path: path.stat().st_mtime_ns for path in job.folder.rglob("*")}
    write_spool(job)
    assert {path: path.stat().st_mtime_ns for path in job.folder.rglob("*")} == before, "there is nothing more to do"


def test_the_order_is_that_of_windows_and_then_of_the_whole(small: None, text: Path, tmp_path: Path) -> None:
    job = job_of(text, tmp_path / "stream")
    write_all(job)
    stream = open_stream(job)
    assert stream.size is None
    first = stream.at(np.arange(WINDOW), seed=3, number=0)
    size = stream.size
    assert size == Concatenated(Shards(job.folder), SEQ_LEN).size and size % WINDOW
    for start in range(0, size, WINDOW):
        own = np.arange(start, min(start + WINDOW, size))
        assert sorted(stream.at(own, seed=3, number=0)) == own.tolist(), "a window is a permutation of itself"
    assert not np.array_equal(first, np.arange(WINDOW))
    assert not np.array_equal(first + WINDOW, stream.at(np.arange(WINDOW, 2 * WINDOW), seed=3, number=0))
    assert not np.array_equal(first, stream.at(np.arange(WINDOW), seed=4, number=0))
    assert not np.array_equal(first, stream.at(np.arange(WINDOW), seed=3, number=1))
    orders = stream.at(np.arange(3 * size), seed=3, number=0).reshape(3, size)
    assert np.array_equal(np.sort(orders), np.tile(np.arange(size), (3, 1)))
    assert not np.array_equal(orders[1], orders[2])
    assert np.abs(orders[1] - np.arange(size)).max() > WINDOW, "a further epoch is not bound to windows"
    assert np.array_equal(stream.at(np.arange(3 * size)[::-7], seed=3, number=0), orders.ravel()[::-7])
    rows = stream.rows(first).tokens
    expected = tokens_of([text_of(i) for i in range(DOCUMENTS)])
    assert np.array_equal(rows[5], expected[first[5] * SEQ_LEN :][: SEQ_LEN + 1])
    spans = stream.spans(int(first[5]))
    found = np.concatenate([stream.shards.document(s.document)[s.start : s.stop] for s in spans])
    assert np.array_equal(found, rows[5])


def test_samples_before_the_end_are_those_that_they_are_afterwards(small: None, text: Path, tmp_path: Path) -> None:
    job = job_of(text, tmp_path / "stream")
    write_some(job, 3 * WINDOW * SEQ_LEN)
    early = open_stream(job)
    own = np.arange(4 * WINDOW)
    places = early.at(own, seed=1, number=0)
    rows = early.rows(places).tokens
    assert early.size is None and END not in load_manifest(job.folder).files
    write_all(job)
    late = open_stream(job)
    assert np.array_equal(late.at(own, seed=1, number=0), places)
    assert np.array_equal(late.rows(places).tokens, rows)
    early.at(np.array([10**6]), seed=1, number=0)  # any position, once the end is known
    assert early.size == late.size


def test_a_writer_stays_a_little_ahead_of_what_is_wanted(small: None, text: Path, tmp_path: Path) -> None:
    job = job_of(text, tmp_path / "stream")
    for wanted in (0, 2000, 2000, 5000):
        write_some(job, wanted)
        assert wanted + 1000 <= Shards(job.folder).num_tokens < wanted + 1000 + 2500
        assert len(list((job.folder / WANTED).iterdir())) == 1


def test_killed_anywhere_a_spool_goes_on_to_the_same_tokens(small: None, text: Path, tmp_path: Path) -> None:
    whole, job = job_of(text, tmp_path / "whole"), job_of(text, tmp_path / "stream")
    write_all(whole)
    for wanted in range(0, 9000, 1000):
        write_some(job, wanted)
        pairs = len(list(job.folder.glob("*.bin")))
        # What a kill leaves: a pair that is written, one that is in the folder and not in the manifest, wishes.
        (job.folder / "work").mkdir(exist_ok=True)
        (job.folder / "work" / "00000.bin").write_bytes(b"half")
        (job.folder / f"{pairs:05d}.bin").write_bytes(b"half")
        (job.folder / f"READ-{pairs + 1:05d}.json").write_bytes(b"{")
        (job.folder / "MANIFEST.json.tmp").write_bytes(b"{")
    write_all(job)
    verify(job.folder)
    ours, theirs = Shards(job.folder), Shards(whole.folder)
    assert np.array_equal(ours.tokens(0, ours.num_tokens), theirs.tokens(0, theirs.num_tokens))
    assert ours.manifest and theirs.manifest
    for name in ("documents", "raw_bytes", "unigram_entropy", "skipped"):
        assert getattr(ours.manifest, name) == getattr(theirs.manifest, name)
    listed = {path.name for path in job.folder.iterdir() if path.is_file()}
    assert listed == {*ours.manifest.files, "MANIFEST.json", "LOCK"}, "nothing is left behind"


def test_a_rank_waits_for_a_window_and_for_the_end(small: None, text: Path, tmp_path: Path) -> None:
    job = job_of(text, tmp_path / "stream")
    stream = open_stream(job, wait_seconds=20)
    threading.Timer(0.3, lambda: write_spool(job, pause=lambda: time.sleep(0.01))).start()
    began_at = time.monotonic()
    assert sorted(stream.at(np.arange(WINDOW), seed=0, number=0)) == list(range(WINDOW))
    assert time.monotonic() - began_at >= 0.3 and stream.size is None
    stream.at(np.array([10**5]), seed=0, number=0)  # each look further wants more, up to the end
    assert stream.size == Concatenated(Shards(job.folder), SEQ_LEN).size


def test_who_waits_in_vain_says_for_what(small: None, text: Path, tmp_path: Path) -> None:
    job = job_of(text, tmp_path / "stream")
    with pytest.raises(RunError, match=r"has 0 tokens of the stream, and the first 513 are needed; they did not come"):
        open_stream(job, wait_seconds=0.2).at(np.arange(2), seed=0, number=0)
    with pytest.raises(UserError, match="there is no text of this stream yet"):
        _ = open_stream(job, wait_seconds=0).shards
    write_some(job, 0)
    with pytest.raises(UserError, match="the run has not come that far"):
        open_stream(job, wait_seconds=0).at(np.array([4000]), seed=0, number=0)


def test_what_ended_the_writer_is_told_after_what_it_wrote(small: None, text: Path, tmp_path: Path) -> None:
    job = job_of(text, tmp_path / "stream")
    write_some(job, 0)
    (job.folder / ERROR).write_text(json.dumps({"kind": "UserError", "text": "text.jsonl: is gone"}))
    stream = open_stream(job, wait_seconds=20)
    stream.at(np.arange(WINDOW), seed=0, number=0)
    with pytest.raises(UserError, match="text.jsonl: is gone"):
        stream.at(np.array([4000]), seed=0, number=0)
    (job.folder / ERROR).write_text(json.dumps({"kind": "RunError", "text": "died"}))
    with pytest.raises(RunError, match="died"):
        stream.at(np.array([4000]), seed=0, number=0)


WRONG: list[tuple[str, str, dict[str, object], str]] = [
    ("text.jsonl", '{"body": "a"}\n' * 50, {}, r'text.jsonl:1: no string "text" .*so 11 of 11 documents'),
    ("text.jsonl", '{"text": "a b"}\n' * 50 + "{\n", {}, r"text.jsonl:51: .*so 1 of 51 doc.*1 json; allowed are 0.1%"),
    ("text.jsonl", '{"text": "a b"}\n' * 50 + "{\n" * 3, {"max_skipped": "2"}, r"so 3 of 53"),
    ("text.jsonl", "\n", {}, "text.jsonl: .*no documents"),
    ("absent.jsonl", "", {}, "other.jsonl: "),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "settings", "told"), WRONG, ids=[case[3][:20] for case in WRONG])
def test_text_that_cannot_be_read_ends_it(
    small: None, tmp_path: Path, name: str, content: str, settings: dict[str, object], told: str
) -> None:
    (tmp_path / name).write_text(content)
    job = job_of(tmp_path / name.replace("absent", "other"), tmp_path / "stream", **settings)
    with pytest.raises(UserError, match=told):
        write_all(job)


def test_what_is_skipped_within_the_limit_is_counted(small: None, text: Path, tmp_path: Path) -> None:
    lines = text.read_text().splitlines(keepends=True)
    text.write_text("".join([*lines[:50], "{\n", *lines[50:80], '{"text": ""}\n', *lines[80:]]))
    job = job_of(text, tmp_path / "stream", max_skipped="1%")
    for wanted in (0, 3000):
        write_some(job, wanted)
    write_all(job)
    manifest = load_manifest(job.folder)
    assert (manifest.documents, manifest.skipped) == (DOCUMENTS, {"empty": 1, "json": 1})


@pytest.mark.parametrize("same_size", [False, True])
def test_another_text_under_the_same_name_is_refused(
    small: None, text: Path, tmp_path: Path, same_size: bool
) -> None:
    job = job_of(text, tmp_path / "stream")
    write_some(job, 0)
    before = text.read_text()
    text.write_text(before.replace("cat", "dog") if same_size else before + json.dumps({"text": "more"}) + "\n")
    with pytest.raises(UserError, match="is not what it was when the stream was begun.* remove .* to read"):
        write_all(job)


def test_sizes_of_a_run_do_not_change_what_a_step_reads(small: None, text: Path, tmp_path: Path) -> None:
    data = config(text)
    job = job_of(text, tmp_path)
    write_all(job)

    def step(consumed: int, dp: int) -> list[list[int]]:
        spools = Spools(tmp_path, wait_seconds=5)
        sizes = {"vocab_size": 340, "global_batch": 8, "micro_batch": 1, "dp": dp}
        ranks = [Loader(data, dp_rank=rank, spools=spools, **sizes) for rank in range(dp)]
        return [row for rank in ranks for batch in rank.microbatches(consumed) for row in batch.tokens.tolist()]

    size = Concatenated(Shards(job.folder), SEQ_LEN).size
    for consumed in (0, 8, size // 8 * 8, size + 16):
        assert step(consumed, 1) == step(consumed, 2) == step(consumed, 8)
    whole = size // WINDOW * WINDOW
    everything = [row for consumed in range(0, whole, 8) for row in step(consumed, 1)]
    assert sorted(everything) == sorted(Shards(job.folder).rows(np.arange(whole) * SEQ_LEN, SEQ_LEN + 1).tolist())


def test_a_stream_mixes_with_shards(small: None, text: Path, tmp_path: Path) -> None:
    job = job_of(text, tmp_path)
    shards = make_shards(tmp_path / "more", first=500)
    write_some(job, 2 * WINDOW * SEQ_LEN)
    data = config(text)
    data = data.model_copy(update={"train": [*data.train, Source(shards=str(shards), weight=3)]})
    sizes = {"vocab_size": 340, "global_batch": 8, "micro_batch": 8, "dp": 1, "dp_rank": 0}
    loader = Loader(data, spools=Spools(tmp_path, wait_seconds=5), **sizes)
    sizes_known = loader.num_samples
    rows = torch.cat([loader.microbatches(consumed)[0].tokens for consumed in range(0, 4 * WINDOW, 8)]).tolist()
    assert sizes_known == [None, Concatenated(Shards(shards), SEQ_LEN).size]
    streamed = Shards(job.folder).rows(np.arange(WINDOW) * SEQ_LEN, SEQ_LEN + 1).tolist()
    assert Counter(map(tuple, streamed)) <= Counter(map(tuple, rows)), "its first window, in a quarter of the samples"


@pytest.mark.parametrize(
    ("source", "settings", "told"),
    [
        ("{weight: 1}", (), "data.train.0: of shards and stream it has neither; give one of the two"),
        ("{shards: s, stream: {path: t}}", (), "data.train.0: of shards and stream it has both"),
        ("{stream: {path: t}, epochs: 2}", (), "data.train.0.epochs=2: how long a stream is shows only at its end"),
        ("{stream: {path: t}}", ("data.packing=best_fit",), "data.packing=best_fit needs all documents at hand"),
        ("{stream: {text: t}}", (), "data.train.0.stream.path is missing"),
        ("{stream: {path: t, window: 0}}", (), "data.train.0.stream.window=0 is not allowed"),
    ],
)
def test_a_source_that_cannot_be_is_explained(repo: Path, source: str, settings: tuple[str, ...], told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        load_config(repo / "configs" / "run" / "tiny.yaml", [f"data.train=[{source}]", *settings])


@pytest.mark.parametrize("spelling", ["file", "json", "folder"])
def test_what_datasets_reads_is_a_stream_too(text: Path, tmp_path: Path, spelling: str) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text(text.read_text())
    settings = {"path": str(text if spelling == "file" else folder)}
    if spelling == "json":
        settings = {"path": "json", "data_files": str(text)}
    stream = StreamSource(window=WINDOW, **settings)
    data = config(text).model_copy(update={"train": [Source(stream=stream)]})
    (job,) = jobs_of(data, fingerprint=fingerprint_of(data.tokenizer), folder=tmp_path / "stream", logs=tmp_path)
    write_all(job)
    expected = tokens_of([text_of(i) for i in range(DOCUMENTS)])
    assert np.array_equal(Shards(job.folder).tokens(0, len(expected)), expected)


def test_spellings_and_identities() -> None:
    assert spelled(StreamSource(path="x/*.jsonl.gz")) == "x/*.jsonl.gz"
    assert spelled(StreamSource(path="a/b", name="en", split="validation")) == "datasets:a/b?name=en&split=validation"
    files = ["a b.jsonl", "c"]
    assert spelled(StreamSource(path="json", data_files=files)) == "datasets:json?data_files=a+b.jsonl&data_files=c"
    with pytest.raises(UserError, match="stream.path='x.jsonl': names files, and stream.name is for data sets"):
        spelled(StreamSource(path="x.jsonl", name="en"))
    one, other = StreamSource(path="a/b.jsonl"), StreamSource(path="a/b.jsonl", window=7, max_skipped="3")
    assert spool_of(one, "f", Path("s")) == spool_of(other, "f", Path("s")) != spool_of(one, "g", Path("s"))
    assert spool_of(one, "f", Path("s")).name.startswith("a-b.jsonl-")
    assert identity_of(one, "f") != identity_of(other, "f")
    assert identity_of(one, "f") == identity_of(StreamSource(path="a/b.jsonl", max_skipped="3"), "f")


def test_a_process_beside_the_run_fills_the_spool_and_tells_what_ended_it(text: Path, tmp_path: Path) -> None:
    job = job_of(text, tmp_path / "stream")
    with spooling([job]):
        open_stream(job, wait_seconds=60).at(np.arange(WINDOW), seed=0, number=0)
    assert "that was all" in job.log.read_text() and not (job.folder / ERROR).exists()

    bad = job_of(text, tmp_path / "stream", text="body")
    with spooling([bad]), pytest.raises(UserError, match=r'text.jsonl:1: no string "body"'):
        open_stream(bad, wait_seconds=60).at(np.arange(WINDOW), seed=0, number=0)


def test_a_process_that_is_killed_is_told(text: Path, tmp_path: Path) -> None:
    job = job_of(text, tmp_path / "stream")
    job.folder.mkdir(parents=True)
    told = pytest.raises(RunError, match=r"the process of this stream died \(killed by signal 9")
    with Claims(job.folder / "LOCK") as held, spooling([job]), told:
        assert held.take_folder()  # so that it waits, and there is something to kill
        (child,) = (child for child in multiprocessing.active_children() if child.name.startswith("stream"))
        child.kill()
        open_stream(job, wait_seconds=60).at(np.arange(WINDOW), seed=0, number=0)
    assert not [child for child in multiprocessing.active_children() if child.name.startswith("stream")]
