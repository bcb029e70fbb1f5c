"""A multiple-choice benchmark from held-out text: which of four passages goes on where the context ends?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any

from llama_dist.data.documents import Document

CONTEXT = (300, 400)
CONTINUATION = (100, 150)
MIN_LETTERS = 0.5
LONG_LINE = 30
NUM_DISTRACTORS = 3

Passage = tuple[str, str, str]
"""(document id, context, continuation)."""


def make_choices(
    heldout: Mapping[str, Sequence[Document]], train: Mapping[str, Sequence[Document]], *, count: int
) -> list[dict[str, Any]]:
    """At most `count` items `{"context", "choices" (4), "answer"}` of the held-out documents of each kind.

    Contexts end with a newline and continuations begin a line, so the tokens of the two do not run into each other.
    Distractors are passages of other held-out documents of the same kind, as long to the character, ending at
    whitespace too, and indented alike where possible. No passage has a long line that train has. The place of the
    answer is even over 0..3.
    """
    known = {line for documents in train.values() for d in documents for line in _long_lines(d.text)}
    items: list[tuple[Passage, list[str]]] = []
    smallest_first = sorted(heldout.items(), key=lambda item: sum(len(d.text) for d in item[1]))
    for i, (_, documents) in enumerate(smallest_first):
        wanted = (count - len(items)) // (len(heldout) - i)
        used = {context for (_, context, _), _ in items}
        items += _items_of_kind(documents, known, wanted=wanted, used=used)
    items.sort(key=lambda item: _hash(item[0][1]))
    return [_row(item, answer=i % (NUM_DISTRACTORS + 1)) for i, item in enumerate(items)]


def _row(item: tuple[Passage, list[str]], *, answer: int) -> dict[str, Any]:
    (_, context, continuation), distractors = item
    choices = [*distractors[:answer], continuation, *distractors[answer:]]
    return {"context": context, "choices": choices, "answer": answer}


def _items_of_kind(
    documents: Sequence[Document], known: set[str], *, wanted: int, used: set[str]
) -> Iterator[tuple[Passage, list[str]]]:
    """Passages with their distractors, taken in turn from all documents; `used` contexts are passed over."""
    line_starts = {d.id: [i + 1 for i, c in enumerate(d.text) if c == "\n"] for d in documents}
    queues = [list(_passages(d, line_starts[d.id], known)) for d in documents]
    turns = [queue[turn] for turn in range(max(map(len, queues), default=0)) for queue in queues if turn < len(queue)]
    found = 0
    for passage in turns:
        if found == wanted:
            return
        distractors = _distractors(passage, documents, line_starts, known)
        if distractors and passage[1] not in used:
            found += 1
            used.add(passage[1])
            yield passage, distractors


def _passages(document: Document, line_starts: Sequence[int], known: set[str]) -> Iterator[Passage]:
    """Passages of a document that do not overlap, in the order of their hashes."""
    passages, free_from = [], 0
    for start in line_starts:
        begin = next((s for s in (0, *line_starts) if start - CONTEXT[1] <= s <= start - CONTEXT[0]), None)
        if begin is None or begin < free_from:
            continue
        context = document.text[begin:start]
        length = _length_to_space(document.text, start)
        continuation = document.text[start : start + length]
        if length and _is_telling(continuation, known) and _is_telling(context, set()):
            passages.append((document.id, context, continuation))
            free_from = start + length
    return iter(sorted(passages, key=lambda p: _hash(p[1])))


def _length_to_space(text: str, start: int) -> int:
    """How long the continuation is that ends before the last whitespace it may end at; 0 where there is none."""
    for length in range(CONTINUATION[1], CONTINUATION[0] - 1, -1):
        if _ends_well(text, start, length):
            return length
    return 0


def _ends_well(text: str, start: int, length: int) -> bool:
    stop = start + length
    return stop < len(text) and text[stop].isspace() and not text[stop - 1].isspace()


def _distractors(
    passage: Passage, documents: Sequence[Document], line_starts: Mapping[str, Sequence[int]], known: set[str]
) -> list[str]:
    """Three passages of other documents, of as many different ones as there are; none where three cannot be found."""
    name, context, continuation = passage
    length, indent = len(continuation), _indent(continuation)
    others = sorted((d for d in documents if d.id != name), key=lambda d: _hash(context + d.id))
    found: list[str] = []
    for same_indent in (True, False):
        for _ in range(NUM_DISTRACTORS):
            for document in others:
                if len(found) == NUM_DISTRACTORS:
                    return found
                starts = sorted(line_starts[document.id], key=lambda s: _hash(f"{s}{context}"))
                fitting = (
                    document.text[s : s + length] for s in starts if _ends_well(document.text, s, length)
                )
                wanted = (
                    t for t in fitting
                    if t not in found and (not same_indent or _indent(t) == indent) and _is_telling(t, known)
                )  # fmt: skip
                text = next(wanted, None)
                if text is not None:
                    found.append(text)
    return found if len(found) == NUM_DISTRACTORS else []


def _is_telling(text: str, known: set[str]) -> bool:
    """Whether a passage is mostly letters and has no long line of `known`."""
    letters = sum(c.isalpha() for c in text)
    return letters >= MIN_LETTERS * len(text) and not any(line in known for line in _long_lines(text))


def _long_lines(text: str) -> Iterator[str]:
    lines = (line.strip() for line in text.split("\n"))
    return (line for line in lines if len(line) >= LONG_LINE)


def _indent(text: str) -> int:
    return len(text) - len(text.lstrip())


def _hash(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=8).digest()
