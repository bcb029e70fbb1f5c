"""`llama-dist clean`: what goes and what stays, the same for any number of workers and any bound of the memory."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
from data_helpers import small_tokenizer, text_of, write_jsonl

from llama_dist.cli import main
from llama_dist.data.clean import duplicates, runs
from llama_dist.data.clean.choices import Choices
from llama_dist.data.clean.filters import chosen_filters
from llama_dist.data.clean.jsonl import read_lines
from llama_dist.data.clean.run import clean
from llama_dist.data.documents import Reading, read_documents
from llama_dist.errors import UserError

DEDUP = Choices(dedup=("exact", "near"), max_skipped="1")
PARAGRAPHS = Reading(txt="paragraph")


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in read_lines(path)]


def removed_of(out: Path) -> list[dict[str, Any]]:
    return lines_of(out / "removed.jsonl.zst")


def texts_of(out: Path) -> list[str]:
    return [document.text for document in read_documents([out / "text"])]


def content(folder: Path) -> dict[str, bytes]:
    """Everything that a folder holds."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def edited(words: list[str], share: float, rng: random.Random) -> str:
    """The words with each replaced by another one with this chance."""
    return " ".join(rng.choice(words) + "x" if rng.random() < share else word for word in words)


def similarity(first: str, second: str) -> float:
    sets = []
    for text in (first, second):
        words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
        sets.append({tuple(words[i : i + 5]) for i in range(len(words) - 4)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def planted(folder: Path) -> list[Path]:
    """Three files of 150 texts, each with copies and slightly changed ones of the others, broken and empty lines."""
    rng = random.Random(0)
    texts = [" ".join(f"{rng.randrange(900)}w" for _ in range(120)) for _ in range(300)]
    texts += [texts[rng.randrange(300)] + "  \n" for _ in range(75)]
    for i in rng.sample(range(300), 75):
        words = texts[i].split()
        words[rng.randrange(120)] = "changed"
        texts.append(" ".join(words))
    rng.shuffle(texts)
    files = [write_jsonl(folder / f"{k}.jsonl", texts[150 * k : 150 * k + 150]) for k in range(3)]
    files[1].write_text(files[1].read_text() + '{broken\n{"text": ""}\n{"text": "  "}\n')
    return files


def test_nothing_depends_on_workers_units_or_partitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = planted(tmp_path)
    held_out = write_jsonl(tmp_path / "heldout.jsonl", [_text(inputs[0], 4), _text(inputs[2], 9)])
    choices = Choices(
        filters=chosen_filters(["gopher_repetition"]),
        dedup=("exact", "near"),
        against=[held_out],
        removed_texts=True,
        max_skipped="1",
    )
    reports = [
        clean(inputs, tmp_path / f"workers{n}", choices, workers=n, unit_bytes=20_000).to_json() for n in (1, 2, 3)
    ]
    first = content(tmp_path / "workers1")
    assert len([name for name in first if name.startswith("text")]) >= 5
    assert content(tmp_path / "workers2") == first == content(tmp_path / "workers3")
    assert reports[0] == reports[1] == reports[2]

    monkeypatch.setattr(duplicates, "MOST_RECORDS", 64)
    monkeypatch.setattr(duplicates, "_PAIRS", 5)
    monkeypatch.setattr(runs, "RUN_RECORDS", 100)
    clean(inputs, tmp_path / "small", choices, workers=1, unit_bytes=20_000)
    assert content(tmp_path / "small") == first

    clean(inputs, tmp_path / "one", choices, workers=1)
    assert texts_of(tmp_path / "one") == texts_of(tmp_path / "workers1")
    names = ["held-out.jsonl.zst", "removed.jsonl.zst", "report.json", "text/00000.jsonl.zst"]
    assert list(content(tmp_path / "one")) == names


def _text(file: Path, line: int) -> str:
    return str(json.loads(file.read_text().splitlines()[line])["text"])


def test_every_document_is_kept_or_listed(tmp_path: Path) -> None:
    inputs = planted(tmp_path)
    report = clean(inputs, tmp_path / "out", DEDUP, workers=1, unit_bytes=20_000)
    removed, kept = removed_of(tmp_path / "out"), lines_of_text(tmp_path / "out")
    saved = json.loads((tmp_path / "out/report.json").read_text())
    assert saved["in"]["documents"] == 453 == len(kept) + len(removed)
    assert saved["out"] == {"documents": len(kept), "bytes": sum(len(item["text"].encode()) for item in kept)}
    reasons = Counter(item["reason"] for item in removed)
    assert {name: tally["documents"] for name, tally in saved["removed"].items()} == reasons
    assert reasons["unreadable.json"] == 1 and reasons["empty"] == 2
    assert reasons["exact_duplicate"] == 75 and reasons["near_duplicate"] == 75
    assert sum(tally["bytes"] for tally in saved["removed"].values()) + saved["out"]["bytes"] == saved["in"]["bytes"]
    assert saved["removed"]["unreadable.json"]["examples"] == [f"{inputs[1]}:151"]

    # The first of the copies is what stays; the order is that of the units, in which places are bytes of a file.
    stays = {item["id"] for item in kept}
    copies = [(item["id"], item["duplicate_of"]) for item in removed if "duplicate_of" in item]
    assert len(copies) == 150 and all(original in stays for _, original in copies)
    assert all(place_of(original) < place_of(copy) for copy, original in copies)
    table = "\n".join(report.lines())
    assert "exact_duplicate" in table and "453" in table and f"{inputs[1]}:151" in table


def lines_of_text(out: Path) -> list[dict[str, Any]]:
    return [item for file in sorted((out / "text").iterdir()) for item in lines_of(file)]


def place_of(where: str) -> tuple[str, int]:
    """An id ("file:line" or "file@byte") as something that can be ordered."""
    file, mark, number = re.fullmatch(r"(.+)([:@])(\d+)", where).groups()
    lines = Path(file).read_bytes().splitlines(keepends=True)
    return file, int(number) if mark == "@" else sum(map(len, lines[: int(number) - 1]))


@pytest.mark.parametrize("share", [0.002, 0.01, 0.05])
def test_recall_and_precision_on_stories(shared_data: Path, tmp_path: Path, share: float) -> None:
    """Near duplicates planted among real stories at known rates of edited words, held against the true similarity."""
    rng = random.Random(3)
    source = shared_data / "corpora/tinystories_2MiB.txt"
    stories = [d.text for d in read_documents([source], PARAGRAPHS) if len(d.text.split()) >= 80]
    first_time = list(dict.fromkeys(stories))
    chosen = rng.sample(range(len(first_time)), 200)
    copies = [edited(first_time[i].split(), share, rng) for i in chosen]
    inputs = write_jsonl(tmp_path / "a.jsonl", first_time + copies)
    clean([inputs], tmp_path / "out", DEDUP, workers=1)
    texts = first_time + copies
    removed = removed_of(tmp_path / "out")
    pairs = [[int(item[key].rpartition(":")[2]) - 1 for key in ("id", "duplicate_of")] for item in removed]
    true = [similarity(texts[i], copy) for i, copy in zip(chosen, copies, strict=True)]
    found = {copy - len(first_time) for copy, _ in pairs if copy >= len(first_time)}
    surely = [k for k, value in enumerate(true) if value >= 0.9]
    never = [k for k, value in enumerate(true) if value < 0.65]
    assert len([k for k in surely if k in found]) >= 0.99 * len(surely)
    assert not found & set(never)
    assert {0.002: len(surely) > 180, 0.01: len(surely) > 80, 0.05: len(never) > 100}[share]
    # Of the stories themselves only those go that are much like one before them.
    assert all(similarity(texts[copy], texts[original]) > 0.7 for copy, original in pairs)


def test_copies_of_stories_are_found_whatever_their_white_space(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "corpora/tinystories_2MiB.txt"
    stories = [d.text for d in read_documents([source], PARAGRAPHS)]
    once = len({" ".join(story.split()) for story in stories})
    inputs = write_jsonl(tmp_path / "a.jsonl", [*stories, *(story.replace(" ", "  ") + "\n" for story in stories[::3])])
    report = clean([inputs], tmp_path / "out", Choices(dedup=("exact",)), workers=2, unit_bytes=400_000)
    assert report.counts.kept.documents == once == len(texts_of(tmp_path / "out"))
    assert texts_of(tmp_path / "out") == list(dict.fromkeys(stories))


def test_wikitext_shares_no_paragraph_with_its_validation_set(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, valid = (shared_data / f"corpora/wikitext2_{part}.txt" for part in ("train_part", "valid"))
    lines = Reading(txt="line")
    choices = Choices(against=[valid], against_reading=lines, reading=lines, report_only=True)
    report = clean([train], tmp_path / "out", choices, workers=1)
    hits = lines_of(tmp_path / "out/held-out.jsonl.zst")
    assert report.held_out and 0 < report.held_out["hit"] == len(hits) < 20
    assert all(hit["shared"] < 0.5 * hit["runs"] for hit in hits), "phrases, not paragraphs"
    assert report.counts.removed["held_out"].documents < 20 and not (tmp_path / "out/text").exists()

    # Three of its paragraphs, hidden in the training set, are all found.
    paragraphs = [d for d in read_documents([valid], lines) if len(d.text.split()) > 60][:30:10]
    leaked = write_jsonl(tmp_path / "leak.jsonl", [f"So it is said: {d.text.upper()} (end)" for d in paragraphs])
    report = clean([train, leaked], None, choices, workers=1)
    assert [item["id"] for item in report.held_out["most_hit"][:3]] == [d.id for d in paragraphs]
    assert all(item["shared"] == item["runs"] for item in report.held_out["most_hit"][:3])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    long = " ".join(f"word{i}" for i in range(60))
    write_jsonl(Path("train.jsonl"), [text_of(1), text_of(2, words=80), text_of(1), f"of {long} to", "short"])
    Path("heldout.jsonl").write_text(json.dumps({"q": long, "a": "yes"}) + "\n")
    against = ["--against", "heldout.jsonl", "--against-template", "{q} {a}"]
    assert main(["clean", "--report-only", *against, "train.jsonl"]) == 0
    printed = capsys.readouterr().out
    assert "held_out" in printed and "would be out" in printed and "48 of 49 runs of heldout.jsonl:1" in printed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["heldout.jsonl", "train.jsonl"]

    steps = ["--dedup", "exact,near", "--filters", "gopher_quality", *against]
    command = ["clean", "train.jsonl", "--out", "out", *steps]
    settings = ["--set", "gopher_quality.min_doc_words=2", "--set", "gopher_quality.min_stop_words=null"]
    assert main([*command, *settings, "--workers", "1", "--format", ".jsonl", "--removed-texts"]) == 0
    capsys.readouterr()
    assert [d.text for d in read_documents(["out/text"])] == [text_of(1), text_of(2, words=80)]
    removed = [json.loads(line) for line in Path("out/removed.jsonl").read_text().splitlines()]
    assert [(item["id"], item["reason"], item["removed_text"]) for item in removed] == [
        ("train.jsonl:4", "held_out", f"of {long} to"),
        ("train.jsonl:5", "gopher_quality.short_doc", "short"),
        ("train.jsonl:3", "exact_duplicate", text_of(1)),
    ]
    report = json.loads(Path("out/report.json").read_text())
    assert report["settings"]["filters"]["gopher_quality"]["min_doc_words"] == 2
    assert report["held_out"]["hit"] == 1 and report["files"]["text/00000.jsonl"]["bytes"] > 100
    assert main(["prepare", "out/text", "--tokenizer", str(small_tokenizer()), "--out", "shards", "--workers", "1"]) == 0
    assert main(["clean", "--list-filters"]) == 0
    assert "gopher_quality.min_doc_words=50\n" in capsys.readouterr().out


def test_lines_that_filters_take_out_are_counted(tmp_path: Path) -> None:
    text = "\n".join(f"This is the sentence number {i}." for i in range(9))
    inputs = write_jsonl(tmp_path / "a.jsonl", [text + "\nwithout an end mark", text])
    choices = Choices(filters=chosen_filters(["c4"]), removed_texts=True)
    report = clean([inputs], tmp_path / "out", choices, workers=1)
    assert texts_of(tmp_path / "out") == [text, text]
    assert report.counts.changed.documents == 1 and report.counts.changed.bytes == len("\nwithout an end mark")
    assert report.counts.lines == {"c4.line_no_terminal_punc": 1}
    (item,) = removed_of(tmp_path / "out")
    assert (item["reason"], item["kept"], item["removed_text"]) == ("lines", True, text + "\nwithout an end mark")
    assert "1 document changed by lines that were taken out: c4" in "\n".join(report.lines())


def test_what_cannot_be_read_stops_it_over_a_threshold(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [text_of(i) for i in range(9)])
    source.write_bytes(source.read_bytes() + b'{"text": "\xff"}\n')
    usual = Choices(dedup=("exact",))
    too_many = "a.jsonl:10: .*so 1 of 10 documents had to be skipped: 1 encoding; allowed are 0.1%.; "
    for _ in range(2):
        with pytest.raises(UserError, match=f"^[^\n]*{too_many}[^\n]*out.skipped.jsonl lists them; mend them"):
            clean([tmp_path], tmp_path / "out", usual, workers=1)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out.skipped.jsonl"]
    (item,) = [json.loads(line) for line in (tmp_path / "out.skipped.jsonl").read_text().splitlines()]
    assert (item["where"], item["kind"]) == (f"{source}:10", "encoding") and "byte" in item["reason"]
    report_only = Choices(dedup=("exact",), report_only=True)
    with pytest.raises(UserError, match=f"{too_many}give --out to have them listed; mend"):
        clean([source], None, report_only, workers=1)
    report = clean([tmp_path], tmp_path / "out", Choices(dedup=("exact",), max_skipped="10%"), workers=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out"]
    assert report.counts.removed["unreadable.encoding"].documents == 1 and len(texts_of(tmp_path / "out")) == 9


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({}, "nothing to do; give --filters, --dedup or --against"),
        ({"dedup": ("fuzzy",)}, "'fuzzy' is not one; there are exact and near"),
        ({"dedup": ("near",), "similarity": 0.2}, "similarity=0.2: must be from 0.5 to 1"),
        ({"dedup": ("exact",), "max_skipped": "101%"}, "max_skipped='101%': must be a number of documents such as 0, or a share"),
        ({"dedup": ("exact",), "overlap": 0}, "overlap=0: must be at least 1"),
        ({"dedup": ("exact",), "suffix": ".parquet"}, "'.parquet' is not one; there are .jsonl.zst and .jsonl"),
    ],
)
def test_choices_that_make_no_sense(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Choices(**choices)


def test_bad_inputs_and_outputs(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [text_of(1)])
    with pytest.raises(UserError, match="workers=0"):
        clean([source], tmp_path / "out", DEDUP, workers=0)
    with pytest.raises(UserError, match="give the folder to make, or --report-only"):
        clean([source], None, DEDUP)
    with pytest.raises(UserError, match="no such file"):
        clean([tmp_path / "b.jsonl"], tmp_path / "out", DEDUP)
    with pytest.raises(UserError, match="is an input and held out, too"):
        clean([source], tmp_path / "out", Choices(against=[tmp_path / "../" / tmp_path.name / "a.jsonl"]))
    with pytest.raises(UserError, match="a.jsonl: is there already; remove it first"):
        clean([source], source, DEDUP)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="there is no document in them"):
        clean([tmp_path / "empty.jsonl"], tmp_path / "out", DEDUP, workers=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "empty.jsonl"]


def test_nothing_left_is_a_result(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["too short", "!!!"])
    choices = Choices(filters=chosen_filters(["gopher_quality"]), dedup=("exact", "near"))
    report = clean([source], tmp_path / "out", choices, workers=1)
    assert report.counts.kept.documents == 0 and list((tmp_path / "out/text").iterdir()) == []


def test_texts_without_words_are_near_nothing(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["!!!", "???", "...", text_of(1)])
    clean([source], tmp_path / "out", DEDUP, workers=1)
    assert len(texts_of(tmp_path / "out")) == 4


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_killed_it_leaves_no_half_result(tmp_path: Path, repo: Path, how: signal.Signals) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [text_of(i, words=500) for i in range(6000)])
    process = subprocess.Popen(
        [sys.executable, "-m", "llama_dist", "clean", str(source), "--out", str(tmp_path / "out"), "--dedup", "near"]
        + ["--workers", "2"],
        env={**os.environ, "PYTHONPATH": str(repo)},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    started_at = time.monotonic()
    while not list(tmp_path.glob("out.partial-*/*/kept-*")) and process.poll() is None:
        assert time.monotonic() - started_at < 100, "no work was begun"
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children(recursive=True)
    if how == signal.SIGINT:
        os.killpg(process.pid, how)  # as a terminal does
    else:
        process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert not psutil.wait_procs(workers, timeout=30)[1], "workers go on without it"
    assert process.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130), errors
    assert not (tmp_path / "out").exists()
    if how != signal.SIGKILL:
        assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
        assert errors.decode() == "llama-dist clean: interrupted\n"


def die(*args: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_dist.data.clean.run.judge", die)
    source = write_jsonl(tmp_path / "a.jsonl", [text_of(i) for i in range(30)])
    with pytest.raises(UserError, match="a worker process died.*fewer --workers"):
        clean([source], tmp_path / "out", DEDUP, workers=2, unit_bytes=1000)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
