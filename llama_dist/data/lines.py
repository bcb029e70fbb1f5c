"""Text line by line: .txt and .jsonl, whole or any stretch of bytes of it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace

from llama_dist.data.inputs import Part, kind_of
from llama_dist.data.opening import BUFFER, open_input
from llama_dist.data.rows import (
    Document,
    Reading,
    Skipped,
    checked,
    decoded,
    make_document,
    not_utf8,
    shortened,
    too_long,
)

BOM = b"\xef\xbb\xbf"


# A line: its number, counted from 1 where the part begins, its first byte in the file, and its content, with the end of
# the line, or why it could not be read.
Line = tuple[int, int, bytes | Skipped]


def read(part: Part, reading: Reading) -> Iterator[Document | Skipped]:
    jsonl = kind_of(part.path) == "jsonl"
    if not jsonl and reading.txt == "file" and part.start:
        return  # the document begins in the first part
    with open_input(part.path, sequential=part.start == 0) as file:
        if jsonl:
            yield from read_jsonl(file, part, reading)
        elif reading.txt == "file":
            yield _whole(file, part, reading)
        elif reading.txt == "line":
            yield from _each_line(file, part, reading)
        else:
            yield from _paragraphs(file, part, reading)


def read_jsonl(file: io.BufferedReader, part: Part, reading: Reading) -> Iterator[Document | Skipped]:
    for number, offset, line in lines_of(file, part, reading, stop=part.stop):
        if isinstance(line, Skipped):
            yield line
            continue
        where = where_of(part, number, offset)
        text = decoded(line, where, offset=offset)
        if isinstance(text, Skipped):
            yield text
        elif text and not text.isspace():
            yield _parse(text, where, reading)


def lines_of(file: io.BufferedReader, part: Part, reading: Reading, *, stop: int | None) -> Iterator[Line]:
    """The lines that begin at part.start or later, and before `stop`.

    Without the byte order mark; at most `max_document_bytes` and the newline are held of one.
    """
    limit = reading.max_document_bytes
    number, offset = 1, part.start
    if offset:
        file.seek(offset - 1)  # the byte before may be the end of a line
        offset += _pass_over(file, room=None if stop is None else stop - offset + 1) - 1
    while (stop is None or offset < stop) and (line := file.readline(limit + 1)):
        size = len(line)
        if size > limit and not line.endswith(b"\n"):
            yield number, offset, too_long(where_of(part, number, offset), reading)
            offset += _pass_over(file)
        elif offset == 0 and line.startswith(BOM):
            yield number, len(BOM), line[len(BOM) :]
        else:
            yield number, offset, line
        offset += size
        number += 1


def where_of(part: Part, number: int, offset: int) -> str:
    """The line, where it is known: to count those before a part would be to read all of the file before it."""
    return f"{part.path}@{offset}" if part.start else f"{part.path}:{number}"


def _pass_over(file: io.BufferedReader, room: int | None = None) -> int:
    """Read to the end of a line, or `room` bytes of it; returns how many bytes that were."""
    passed = 0
    while (room is None or passed < room) and (piece := file.readline(BUFFER)):
        passed += len(piece)
        if piece.endswith(b"\n"):
            break
    return passed


def _parse(line: str, where: str, reading: Reading) -> Document | Skipped:
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Skipped(where, f'not valid JSON ({shortened(str(error))}); each line must be {{"text": "..."}}', "json")
    if not isinstance(item, dict):
        return Skipped(where, f'no string "{reading.columns[0]}" (found: {type(item).__name__})', "column")
    return make_document(item, where, reading, halves="\\ud" in line or "\\uD" in line)


def _whole(file: io.BufferedReader, part: Part, reading: Reading) -> Document | Skipped:
    content = bytearray()
    while block := file.read1(BUFFER):
        content += block
        if len(content) > reading.max_document_bytes:
            long = too_long(part.path, reading)
            return replace(long, reason=f"{long.reason}, or read the file line by line or by paragraphs")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return not_utf8(content, error, f"{part.path}:{line}", offset=0)
    return checked(part.path, text.removeprefix("\ufeff").replace("\r\n", "\n"), part.path, reading)


def _each_line(file: io.BufferedReader, part: Part, reading: Reading) -> Iterator[Document | Skipped]:
    for number, offset, line in lines_of(file, part, reading, stop=part.stop):
        if isinstance(line, Skipped):
            yield line
        elif line.strip():
            yield _text(line, where_of(part, number, offset), offset, reading)


def _paragraphs(file: io.BufferedReader, part: Part, reading: Reading) -> Iterator[Document | Skipped]:
    """Runs of lines that are not blank. One that began before this part did is not its own."""
    own = part.start == 0
    where, offset, size = "", 0, 0
    lines: list[bytes] = []
    wrong: Skipped | None = None
    for number, begin, content in lines_of(file, part, reading, stop=None):
        blank = isinstance(content, bytes) and not content.strip()
        first = part.start == 0 and number == 1  # begins at 0, even if its text does so behind a mark
        beyond = part.stop is not None and begin >= part.stop and not first
        if blank or (beyond and not own):
            if size:
                yield wrong or _text(b"".join(lines), where, offset, reading)
            if beyond:
                return
            own, size, lines, wrong = True, 0, [], None
        elif own:
            if not size:
                where, offset = where_of(part, number, begin), begin
            size += len(content) if isinstance(content, bytes) else reading.max_document_bytes + 1
            if isinstance(content, Skipped) or size > reading.max_document_bytes:
                lines, wrong = [], too_long(where, reading)
            else:
                lines.append(content)
    if size:
        yield wrong or _text(b"".join(lines), where, offset, reading)


def _text(content: bytes, where: str, offset: int, reading: Reading) -> Document | Skipped:
    """A line or a paragraph: without the end of its last line, and with \\n for every other."""
    text = decoded(content, where, offset=offset)
    if isinstance(text, Skipped):
        return text
    return checked(where, text.replace("\r\n", "\n").removesuffix("\n"), where, reading)
