"""A multiple-choice benchmark from held-out text: which of four passages goes on where the context ends?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import zip_longest
from typing import Any

from llama_dist.data.documents import Document

CONTEXT = 320  # characters
CONTINUATION = 100
NUM_DISTRACTORS = 3
PASSAGES = 60  # of a document, at most
MIN_LETTERS = 0.6
LONG_LINE = 30
ORDER = 4  # characters in an n-gram of the surprise
TRAIN_CHARACTERS = 2_000_000  # of a kind, that n-grams are counted on


@dataclass(frozen=True)
class Passage:
    """A place in a held-out document; `surprise` is what the continuation costs without its context."""

    document: str
    context: str
    continuation: str
    surprise: float


def make_choices(
    heldout: Mapping[str, Sequence[Document]], train: Mapping[str, Sequence[Document]], *, count: int
) -> list[dict[str, Any]]:
    """At most `count` items `{"context", "choices" (4), "answer"}` of the held-out documents of each kind.

    A context ends before a space inside a line, and all continuations begin with one, so that their tokens do not run
    into each other. Distractors come from other held-out documents of the same kind, are as long to the character, and
    of all such those that are about as likely by themselves (by character n-grams of train), so that only the context
    tells the answer. No passage has a long line that train has. The place of the answer is even over 0..3.
    """
    known = {line for documents in train.values() for d in documents for line in _long_lines(d.text)}
    items: list[tuple[Passage, list[str]]] = []
    smallest_first = sorted(heldout.items(), key=lambda item: sum(len(d.text) for d in item[1]))
    for i, (kind, documents) in enumerate(smallest_first):
        wanted = (count - len(items)) // (len(heldout) - i)
        surprise = _surprise_of("".join(d.text for d in train.get(kind, ()))[:TRAIN_CHARACTERS])
        used = {passage.context for passage, _ in items}
        pools = [[p for p in _passages(d, known, surprise) if p.context not in used] for d in documents]
        items += _items(pools)[:wanted]
    items.sort(key=lambda item: _hash(item[0].context))
    return [_row(*item, answer=i % (NUM_DISTRACTORS + 1)) for i, item in enumerate(items)]


def _row(passage: Passage, distractors: list[str], *, answer: int) -> dict[str, Any]:
    choices = [*distractors[:answer], passage.continuation, *distractors[answer:]]
    return {"context": passage.context, "choices": choices, "answer": answer}


def _items(pools: Sequence[Sequence[Passage]]) -> list[tuple[Passage, list[str]]]:
    """Passages with their distractors, taken in turn from all documents."""
    everything = [passage for pool in pools for passage in pool]
    turns = (passage for row in zip_longest(*pools) for passage in row if passage is not None)
    items, contexts = [], set()
    for passage in turns:
        nearest = sorted(
            (other for other in everything if other.document != passage.document),
            key=lambda other: (abs(other.surprise - passage.surprise), _hash(other.context)),
        )
        texts = list(dict.fromkeys(other.continuation for other in nearest[: 4 * NUM_DISTRACTORS]))
        distractors = [text for text in texts if text != passage.continuation][:NUM_DISTRACTORS]
        if len(distractors) == NUM_DISTRACTORS and passage.context not in contexts:
            contexts.add(passage.context)
            items.append((passage, distractors))
    return items


def _passages(document: Document, known: set[str], surprise: Callable[[str], float]) -> list[Passage]:
    """Some passages of a document that do not overlap, in the order of their hashes."""
    text, passages, free_from = document.text, [], 0
    for start in _starts(text):
        context, continuation = text[start - CONTEXT : start], text[start : start + CONTINUATION]
        if start - CONTEXT >= free_from and _is_telling(continuation, known) and _is_telling(context, set()):
            passages.append(Passage(document.id, context, continuation, surprise(continuation)))
            free_from = start + CONTINUATION
    return sorted(passages, key=lambda p: _hash(p.context))[:PASSAGES]


def _starts(text: str) -> Iterator[int]:
    """Places between two words of a line with room for a context before and a continuation behind."""
    for i in range(CONTEXT, len(text) - CONTINUATION):
        if text[i] == " " and text[i - 1].isalnum() and text[i + 1].isalnum():
            yield i


def _surprise_of(text: str) -> Callable[[str], float]:
    """The cost in nats of a passage under a character n-gram model of `text`, smoothed by a constant."""
    whole = Counter(text[i : i + ORDER] for i in range(len(text) - ORDER + 1))
    prefix = Counter(text[i : i + ORDER - 1] for i in range(len(text) - ORDER + 1))

    def surprise(passage: str) -> float:
        grams = (passage[i : i + ORDER] for i in range(len(passage) - ORDER + 1))
        return -sum(math.log((whole[gram] + 0.05) / (prefix[gram[:-1]] + 5.0)) for gram in grams)

    return surprise


def _is_telling(text: str, known: set[str]) -> bool:
    """Whether a passage is mostly letters and has no long line of `known`."""
    letters = sum(c.isalpha() for c in text)
    return letters >= MIN_LETTERS * len(text) and not any(line in known for line in _long_lines(text))


def _long_lines(text: str) -> Iterator[str]:
    lines = (line.strip() for line in text.split("\n"))
    return (line for line in lines if len(line) >= LONG_LINE)


def _hash(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=8).digest()
