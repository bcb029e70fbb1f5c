"""The corpus of the standard library: real text, no leak from held-out to train, a fair benchmark, always the same."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llama_dist.data import corpus as module
from llama_dist.data import stdlib
from llama_dist.data.corpus import gather_corpus, hash_of
from llama_dist.data.documents import Document, read_documents
from llama_dist.data.stdlib import Unit, docstrings_of, list_units
from llama_dist.errors import UserError

NAMES = ("MANIFEST.json", "choices.jsonl", "heldout.jsonl", "train.jsonl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus") / "out"
    gather_corpus(out, max_bytes=3_000_000)
    return out


def read(folder: Path, name: str) -> list[Any]:
    return [json.loads(line) for line in (folder / name).read_text().split("\n") if line]


def test_the_text_is_real_mixed_and_of_the_size_asked_for(folder: Path) -> None:
    documents = list(read_documents([folder / "train.jsonl", folder / "heldout.jsonl"]))
    total = sum(len(d.text.encode()) for d in documents)
    assert 2_700_000 < total <= 3_000_000
    kinds = Counter(d.id.split("/")[0] for d in documents)
    assert set(kinds) == {"topics", "docstrings", "source"} and min(kinds.values()) > 10
    heldout = sum(len(d["text"].encode()) for d in read(folder, "heldout.jsonl"))
    assert 0.04 * total < heldout < 0.1 * total
    assert not any(re.search(r"/(test|tests|pydoc_data|encodings)[./]", d.id) for d in documents)
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    for side in ("train", "heldout"):
        rows = read(folder, f"{side}.jsonl")
        assert sum(kind["documents"] for kind in manifest[side].values()) == len(rows)
        assert sum(kind["bytes"] for kind in manifest[side].values()) == sum(len(r["text"].encode()) for r in rows)


def test_no_held_out_text_is_in_train(folder: Path) -> None:
    train, heldout = read(folder, "train.jsonl"), read(folder, "heldout.jsonl")
    subject = {d["id"].split("/", 1)[1] for d in train if not d["id"].startswith("topics/")}
    assert not subject & {d["id"].split("/", 1)[1] for d in heldout if not d["id"].startswith("topics/")}
    texts = [d["text"] for d in train + heldout]
    assert len(set(texts)) == len(texts)
    known = {line.strip() for d in train for line in d["text"].split("\n") if len(line.strip()) >= 30}
    lines = [line.strip() for d in heldout for line in d["text"].split("\n") if len(line.strip()) >= 30]
    assert len(lines) > 1000
    assert sum(line in known for line in lines) / len(lines) < 0.05


def test_the_benchmark_is_fair(folder: Path) -> None:
    items = read(folder, "choices.jsonl")
    heldout = read(folder, "heldout.jsonl")
    assert 100 <= len(items) <= 200
    answers = Counter(item["answer"] for item in items)
    assert max(answers.values()) - min(answers.values()) <= 1
    assert len({item["context"] for item in items}) == len(items)
    for item in items:
        context, choices = item["context"], item["choices"]
        assert len(context) == 320 and context[-1].isalnum()
        assert len(set(choices)) == 4 and {len(c) for c in choices} == {100} and all(c[0] == " " for c in choices)
        truth = next(d for d in heldout if context + choices[item["answer"]] in d["text"])
        for i, choice in enumerate(choices):
            if i != item["answer"]:
                kind = truth["id"].split("/")[0]
                sources = [d for d in heldout if choice in d["text"] and d["id"].startswith(kind + "/")]
                assert sources and all(d is not truth for d in sources)


def test_the_benchmark_is_not_solved_by_frequent_letters(folder: Path) -> None:
    """The most usual letters, the most newlines, the deepest indentation: none may tell the answer."""
    items = read(folder, "choices.jsonl")
    usual = Counter("".join(d["text"] for d in read(folder, "train.jsonl")))
    scores = {
        "letters": lambda c: sum(usual[x] for x in c),
        "newlines": lambda c: c.count("\n"),
        "indentation": lambda c: len(c) - len(c.lstrip()),
        "words": lambda c: len(c.split()),
    }
    for name, score in scores.items():
        right = sum(max(range(4), key=lambda i: score(item["choices"][i])) == item["answer"] for item in items)
        assert 0.1 < right / len(items) < 0.42, f"{name}: {right} of {len(items)}"


def test_again_is_the_same_and_found_there(folder: Path, tmp_path: Path) -> None:
    again = gather_corpus(tmp_path / "again", max_bytes=3_000_000)
    assert not again.already_there
    for name in NAMES:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == list(NAMES)
    assert gather_corpus(folder, max_bytes=3_000_000).already_there


def test_anything_else_there_is_kept(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="of another Python or of other settings"):
        gather_corpus(folder, max_bytes=2_000_000)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is there and is not a whole corpus"):
        gather_corpus(tmp_path)
    gather_corpus(tmp_path / "cut", max_bytes=200_000)
    (tmp_path / "cut/train.jsonl").write_text("")
    with pytest.raises(UserError, match="a file has another size"):
        gather_corpus(tmp_path / "cut", max_bytes=200_000)


def test_a_small_corpus_is_mixed_too(tmp_path: Path) -> None:
    manifest = gather_corpus(tmp_path / "out", max_bytes=400_000).manifest
    assert sum(kind["bytes"] for side in ("train", "heldout") for kind in manifest[side].values()) > 350_000
    assert manifest["heldout"]["source"]["documents"] >= 3 and manifest["choices"] >= 10


@pytest.mark.parametrize(("arguments", "message"), [
    ({"max_bytes": 10}, "max_bytes=10"),
    ({"heldout_fraction": 0.0}, "heldout_fraction=0.0"),
    ({"heldout_fraction": 1.0}, "heldout_fraction=1.0"),
])  # fmt: skip
def test_bad_settings(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        gather_corpus(tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


def test_a_stripped_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    units = list_units()
    assert {unit.kind for unit in units} == {"modules"} and len(units) > 200
    monkeypatch.setattr(module, "list_units", lambda: units[:2])
    with pytest.raises(UserError, match="this Python has only .* bytes of text"):
        gather_corpus(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_docstrings_stand_under_what_they_are_of() -> None:
    source = '''"""Of the module."""
class A(object):
    """Of the class.

        indented

    The end.
    """
    def f(self, x: int = 3, *y) -> str:
        """Of the method."""
        def inner():
            """Too deep."""
    def bare(self): ...
async def g():
    """Of the function."""
'''
    assert docstrings_of(source, "pack.mod") == (
        "module pack.mod\n\nOf the module.\n\nclass pack.mod.A\n\nOf the class.\n\n    indented\n\nThe end.\n\n"
        "pack.mod.A.f(self, x: int=3, *y)\n\nOf the method.\n\npack.mod.g()\n\nOf the function.\n"
    )
    assert docstrings_of("def f(:", "broken") == "" == docstrings_of("x = 1", "bare")


def test_shared_text_is_never_held_out() -> None:
    own = [f"this line of unit {u} stands nowhere else, number {n}" for u in range(40) for n in range(20)]
    units = []
    for u in range(40):
        lines = own[20 * u : 20 * u + 20]
        if u % 2:
            lines = own[20 * (u - 1) : 20 * u - 10] + lines[:10]  # half of it is the neighbour's
        units.append(Unit(f"u{u}", "modules", (Document(f"source/u{u}", "\n".join(lines)),)))
    text = "\n".join(f"a line only here {i} {hash_of(str(i))}" for i in range(20))
    lonely = Unit("lonely", "modules", (Document("source/lonely", text),))
    train, heldout = module.split_units([*units, lonely], heldout_fraction=0.05)
    assert [unit.name for unit in heldout] == ["lonely"]
    assert len(train) == 40
