"""Perplexity and multiple choice, against scores computed by hand with a model that knows one table."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from data_helpers import make_shards
from torch import Tensor

from llama_dist.data.shards import Shards
from llama_dist.errors import UserError
from llama_dist.eval.scoring import Replica
from llama_dist.eval.tasks import Choice, load_choices, multiple_choice, perplexity, windows


class Letters:
    """A tokenizer of lower-case letters and the line break: break 0, bos 1, eos 2, a is 3."""

    vocab_size, bos_id, eos_id, fingerprint = 29, 1, 2, "letters"

    def encode(self, text: str) -> list[int]:
        return [0 if letter == "\n" else ord(letter) - ord("a") + 3 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i - 3 + ord("a")) for i in ids)


class Bigrams:
    """A scorer whose log p(next | previous) stands in a table, and which counts the tokens that it is shown."""

    def __init__(self, table: dict[str, float], *, default: float) -> None:
        letters = Letters()
        self.rows = torch.full((29, 29), default)
        for pair, value in table.items():
            previous, following = letters.encode(pair)
            self.rows[previous, following] = value
        self.longest = 0

    def forward_only(self, tokens: Tensor) -> Tensor:
        self.longest = max(self.longest, tokens.shape[1])
        return self.rows[tokens[:, :-1], tokens[:, 1:]]


class Even:
    """A scorer to which all of `vocabulary` tokens are equally likely everywhere."""

    def __init__(self, vocabulary: int) -> None:
        self.log_prob = -math.log(vocabulary)

    def forward_only(self, tokens: Tensor) -> Tensor:
        return torch.full((tokens.shape[0], tokens.shape[1] - 1), self.log_prob)


def choose(items: list[Choice], scorer: Bigrams, *, seq_len: int = 16, max_samples: int = 0) -> dict[str, float]:
    return multiple_choice(
        scorer, items, Letters(), seq_len=seq_len, batch=3, replica=Replica(), max_samples=max_samples
    )


def test_the_three_accuracies_compare_what_they_say() -> None:
    # After x: b costs 1, c 2.5, and cc costs 2.5 + 0.3 = 2.8. After a line break: b 0.5, c 9.
    scorer = Bigrams({"xb": -1.0, "xc": -2.5, "cc": -0.3, "\nb": -0.5, "\nc": -9.0}, default=-20.0)
    sums = choose([Choice("x", ("b", "cc"), 0)], scorer)
    # The sum prefers b (-1 to -2.8), and so do bytes (-1 to -1.4); the context says cc (-2.8 + 9.3 to -1 + 0.5).
    assert (sums["accuracy"], sums["accuracy_norm"], sums["accuracy_mutual_info"]) == (1.0, 1.0, 0.0)
    other = choose([Choice("x", ("b", "cc"), 1)], scorer)
    assert (other["accuracy"], other["accuracy_norm"], other["accuracy_mutual_info"]) == (0.0, 0.0, 1.0)

    long = Bigrams({"xb": -1.0, "xc": -1.2, "cc": -0.3}, default=-20.0)
    result = choose([Choice("x", ("b", "cc"), 1)], long)
    assert (result["accuracy"], result["accuracy_norm"]) == (0.0, 1.0)  # -1 to -1.5 in sum, -1 to -0.75 a byte


def test_chance_and_standard_error() -> None:
    scorer = Bigrams({"xa": -1.0}, default=-2.0)
    items = [Choice("x", ("a", "b"), 0), Choice("x", ("a", "b", "c", "d"), 1), Choice("x", ("a", "b"), 0)]
    result = choose([*items, Choice("x", ("b", "a"), 0)], scorer)
    assert result["items"] == 4
    assert result["accuracy"] == 0.5
    assert result["accuracy_stderr"] == pytest.approx(math.sqrt(0.25 / 3))
    assert result["chance"] == pytest.approx((0.5 + 0.25 + 0.5 + 0.5) / 4)
    assert choose([*items, Choice("x", ("b", "a"), 0)], scorer, max_samples=1)["accuracy"] == 1.0


def test_a_long_context_is_cut_on_the_left() -> None:
    scorer = Bigrams({"xb": -1.0}, default=-5.0)
    result = choose([Choice("q" * 50 + "x", ("a", "b"), 1)], scorer, seq_len=8)
    assert result["accuracy"] == 1.0  # the context's end, which decides, is still there
    assert scorer.longest == 9


def test_perplexity_of_a_model_that_knows_nothing_is_its_vocabulary(tmp_path: Path) -> None:
    shards = Shards(make_shards(tmp_path, documents=5))
    for seq_len in (7, 1000):
        result = perplexity(Even(340), shards, seq_len=seq_len, batch=4, replica=Replica())
        assert result["perplexity"] == pytest.approx(340, rel=1e-5)
        assert result["loss"] == pytest.approx(math.log(340), rel=1e-5)
        assert result["documents"] == 5
        # Every token but the first of each document is scored once, however the windows fall.
        assert result["tokens"] == shards.num_tokens - 5
    assert perplexity(Even(340), shards, seq_len=7, batch=4, replica=Replica(), max_samples=2)["documents"] == 2


@pytest.mark.parametrize("length", [1, 2, 8, 9, 10, 17, 25])
def test_windows_score_every_token_once_given_the_one_before(length: int) -> None:
    document = list(range(100, 100 + length))
    scored = []
    for request in windows(document, seq_len=8):
        assert request.scored_from == 1 and 2 <= len(request.tokens) <= 9
        scored += request.tokens[1:]
    assert scored == document[1:]


def test_documents_of_one_token_hold_nothing_to_score() -> None:
    class Short:
        num_documents = 1

        def document(self, i: int) -> Tensor:
            return torch.tensor([1])

    with pytest.raises(UserError, match="data.heldout: its documents hold no token to score"):
        perplexity(Even(10), Short(), seq_len=4, batch=1, replica=Replica())  # type: ignore[arg-type]


def test_a_benchmark_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    # Both characters may stand bare in JSON, and neither ends a line of it.
    path.write_text('{"context": "x\u2028\u0085", "choices": ["a", "b"], "answer": 1}\r\n\n', encoding="utf-8")
    assert load_choices(path) == [Choice("x\u2028\u0085", ("a", "b"), 1)]


GOOD = {"context": "x", "choices": ["a", "b"], "answer": 1}


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "[]",
        json.dumps({"context": "x", "choices": ["a", "b"]}),
        json.dumps({**GOOD, "answer": 2}),
        json.dumps({**GOOD, "answer": -1}),
        json.dumps({**GOOD, "answer": True}),
        json.dumps({**GOOD, "answer": "1"}),
        json.dumps({**GOOD, "choices": ["a"], "answer": 0}),
        json.dumps({**GOOD, "choices": ["a", ""]}),
        json.dumps({**GOOD, "choices": "ab"}),
        json.dumps({**GOOD, "choices": 7}),
        json.dumps({**GOOD, "context": None}),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(UserError, match="b.jsonl:2: is not a multiple-choice item; expected"):
        load_choices(path)


def test_a_benchmark_that_is_missing_empty_or_no_text_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent.jsonl: cannot be read .*; check eval.choices"):
        load_choices(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="empty.jsonl: holds no items"):
        load_choices(tmp_path / "empty.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="bytes.jsonl: cannot be read"):
        load_choices(tmp_path / "bytes.jsonl")


def test_a_choice_longer_than_the_model_reaches_is_counted() -> None:
    scorer = Bigrams({"xb": -1.0}, default=-5.0)
    long = choose([Choice("x", ("a" * 40, "b"), 1)], scorer, seq_len=8)
    assert long["choices_cut"] == 1
    assert choose([Choice("x" * 40, ("a", "b"), 1)], scorer, seq_len=8)["choices_cut"] == 0


def test_a_benchmark_with_a_mark_of_byte_order_is_read(tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"context": "x", "choices": ["a", "b"], "answer": 1}\n')
    assert load_choices(path) == [Choice("x", ("a", "b"), 1)]


@pytest.mark.parametrize("line", ["[" * 100_000, '{"context": "x", "choices": ["\\ud800", "b"], "answer": 1}'])
def test_a_line_that_no_text_can_be_made_of_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match="b.jsonl:1: is not a multiple-choice item"):
        load_choices(path)
