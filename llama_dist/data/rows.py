"""What reading text gives: documents, and whatever was no document with the reason why."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from llama_dist.errors import UserError

MAX_DOCUMENT_BYTES = 64 << 20
MAX_NAMES = 10  # of columns, in a message
MAX_REASON = 500  # characters; what is told of a broken line must not be as long as the line

Txt = Literal["file", "line", "paragraph"]


@dataclass(frozen=True)
class Document:
    """A text that stands by itself, never empty; `id` says where it came from.

    The id is the row's own one, else "file:line" (of .csv and .jsonl: where it begins), "file@byte" in a part that does
    not begin with its file (`with_line` gives the line), "file:row" (parquet, JSON array), "file:batch:row" (arrow) or
    "datasets:...:row"; all but bytes count from 1. A .txt file that is one document has its path.
    """

    id: str
    text: str


@dataclass(frozen=True)
class Skipped:
    """Something that should have been a document, `where` like a document's id, and is none.

    `kind` is one of: "encoding" (not UTF-8, or half a surrogate pair), "nul" (a NUL character), "json", "csv" (broken
    quotes, too many or too few fields), "column" (no text in the column, or in one of the template), "empty" (the text
    is ""), "too_long" (over `Reading.max_document_bytes`), "file" (a file, or what is left of it or of a
    block of rows, cannot be read). `count` is how
    many documents are known to be lost.
    """

    where: str
    reason: str
    kind: str
    count: int = 1

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class Reading:
    """How documents are made of what files hold.

    text: the column (JSON key) that holds the text. template: made of several columns instead, such as
    "{question}\\n{answer}"; strings and numbers are filled in, `{{` is a brace. id: the column of ids; None: "id" where
    there is one. txt: what a .txt file holds: one document, one on each line, or paragraphs between blank lines (blank
    lines are no documents, and the end of the last line is no part of one). max_document_bytes: a longer document (of
    .jsonl: a longer line) is skipped and never held in memory. Raises UserError for values that make no sense.
    """

    text: str = "text"
    template: str | None = None
    id: str | None = None
    txt: Txt = "file"
    max_document_bytes: int = MAX_DOCUMENT_BYTES

    def __post_init__(self) -> None:
        if self.txt not in get_args(Txt):
            raise UserError(f"txt={self.txt!r}: must be one of {', '.join(get_args(Txt))}")
        if self.max_document_bytes < 1:
            raise UserError(f"max_document_bytes={self.max_document_bytes}: must be at least 1")
        if not self.columns:
            raise UserError(f'template={self.template!r}: names no column; write for example "{{question}} {{answer}}"')

    @cached_property
    def pieces(self) -> tuple[tuple[str, str | None], ...]:
        """The template as (what is written, the column whose value follows or None)."""
        assert self.template is not None
        try:
            parsed = list(string.Formatter().parse(self.template))
        except ValueError as error:
            raise UserError(f"template={self.template!r}: {error}; write a brace itself as {{{{ or }}}}") from error
        for _, name, spec, conversion in parsed:
            if name == "" or spec or conversion:
                shown = f"{name or ''}{'!' + conversion if conversion else ''}{':' + spec if spec else ''}"
                raise UserError(
                    f"template={self.template!r}: {{{shown}}} is not just the name of a column; "
                    'write for example "{question} {answer}"'
                )
        return tuple((written, name) for written, name, _, _ in parsed)

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The columns that the text is made of."""
        if self.template is None:
            return (self.text,)
        return tuple(dict.fromkeys(name for _, name in self.pieces if name is not None))

    def id_column(self, names: Mapping[str, Any] | list[str]) -> str | None:
        """The column of ids among those that there are."""
        wanted = "id" if self.id is None else self.id
        return wanted if wanted in names else None


def make_document(row: Mapping[str, Any], where: str, reading: Reading, *, halves: bool = False) -> Document | Skipped:
    """The document of a row (column -> value). `halves`: half surrogates are possible, and looked for."""
    text = _text(row, reading)
    if text is None:
        return Skipped(where, _missing(row, reading), "column")
    if not text:
        return Skipped(where, "the text is empty", "empty")
    found = row.get("id" if reading.id is None else reading.id)
    name = where if found is None else str(found)
    if halves:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return Skipped(where, _half(text, error.start), "encoding")
        name = name.encode(errors="backslashreplace").decode()
    return checked(name, text, where, reading)


def _half(text: str, place: int) -> str:
    character = text[place]
    reason = f"character {place} of the text is half a surrogate pair ({character!r})"
    if "\udc80" <= character <= "\udcff":  # how some readers put such a byte into text
        reason += f", or the byte 0x{ord(character) - 0xDC00:02x}, which is not UTF-8"
    return reason + "; neither is text; write the whole character"


def checked(name: str, text: str, where: str, reading: Reading) -> Document | Skipped:
    """The document, unless its text is empty, too long or has a NUL: then it is binary, or UTF-16 without a mark."""
    if not text:
        return Skipped(where, "the text is empty", "empty")
    if "\0" in text:
        reason = f"character {text.index(chr(0))} of the text is NUL, which no text has (is it binary, or UTF-16?)"
        return Skipped(where, reason, "nul")
    if len(text) > reading.max_document_bytes:
        return too_long(where, reading)
    return Document(name, text)


def decoded(content: bytes, where: str, *, offset: int | None = None) -> str | Skipped:
    """UTF-8 as text; `offset` is the first byte's place in the file, for the message."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        return not_utf8(content, error, where, offset=offset)


def not_utf8(
    content: bytes | bytearray, error: UnicodeDecodeError, where: str, *, offset: int | None = None
) -> Skipped:
    place = f"byte {error.start}" if offset is None else f"byte {offset + error.start} of the file"
    reason = (
        f"{place} (0x{content[error.start]:02x}) is not UTF-8; "
        "only UTF-8 is read; convert the file, for example with `iconv -f LATIN1 -t UTF-8`"
    )
    return Skipped(where, reason, "encoding")


def too_long(where: str, reading: Reading) -> Skipped:
    reason = f"longer than max_document_bytes={reading.max_document_bytes}; raise it, or cut the document"
    return Skipped(where, reason, "too_long")


def shortened(text: str, longest: int = MAX_REASON) -> str:
    """A message without what a broken file may have put into it: its first line, and not too much of it."""
    line = text.strip().split("\n", 1)[0]
    return line if len(line) <= longest else line[:longest] + "..."


def listed(names: Mapping[str, Any] | list[str]) -> str:
    """Column names as a message shows them."""
    shown = [repr(name) for name in list(names)[:MAX_NAMES]]
    return shortened(", ".join(shown + ["..."] * (len(names) > MAX_NAMES)) or "none")


def _text(row: Mapping[str, Any], reading: Reading) -> str | None:
    if reading.template is None:
        text = row.get(reading.text)
        return text if isinstance(text, str) else None
    filled = []
    for written, name in reading.pieces:
        filled.append(written)
        if name is not None:
            value = row.get(name)
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                return None
            filled.append(str(value))
    return "".join(filled)


def _missing(row: Mapping[str, Any], reading: Reading) -> str:
    """Which column has no text, and what is there instead."""
    kind = "string" if reading.template is None else "string or number"
    for name in reading.columns:
        value = row.get(name)
        if isinstance(value, str) or (reading.template is not None and type(value) in (int, float)):
            continue
        found = "null" if value is None else type(value).__name__
        return f'no {kind} "{name}" (found: {found if name in row else "keys " + listed(row)})'
    raise AssertionError(f"the row has all of {reading.columns}")
