"""Text in .json files: one object on each line as in .jsonl, or one array of them."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace

from llama_dist.data.inputs import Part
from llama_dist.data.lines import BOM, read_jsonl
from llama_dist.data.opening import BUFFER, open_input
from llama_dist.data.rows import Document, Reading, Skipped, make_document, shortened, too_long

SPACE = re.compile(r"[ \t\r\n]*")


def read(part: Part, reading: Reading) -> Iterator[Document | Skipped]:
    """An array's documents are numbered from 1. What follows an item that is broken or too long cannot be found."""
    with open_input(part.path, sequential=True) as file:
        begin = file.peek(BUFFER).removeprefix(BOM).lstrip()
        if begin.startswith(b"["):
            yield from _read_array(file, part, reading)
        else:
            yield from read_jsonl(file, part, reading)


def _read_array(file: io.BufferedReader, part: Part, reading: Reading) -> Iterator[Document | Skipped]:
    """Items are parsed from a window of text, to which more is added while it ends within an item."""
    number = 0
    window = _Window(file, reading.max_document_bytes)
    try:
        window.take("\ufeff", needed=False)
        window.take("[")
        while not window.take("]", needed=False):
            if number:
                window.take(",")
            number += 1
            item = window.item()
            where = f"{part.path}:{number}"
            if isinstance(item, dict):
                # Bytes that are not UTF-8 have become half surrogates.
                yield make_document(item, where, reading, halves=True)
            else:
                yield Skipped(where, f'no string "{reading.columns[0]}" (found: {type(item).__name__})', "column")
        if window.next():
            yield Skipped(f"{part.path}:{number + 1}", "there is more after the end of the array", "json")
    except OverflowError:
        long = too_long(f"{part.path}:{number}", reading)
        yield replace(long, reason=f"{long.reason}; what follows it in the array cannot be found")
    except (ValueError, RecursionError) as error:
        reason = f"not valid JSON ({shortened(str(error))}); what follows it in the array cannot be found"
        yield Skipped(f"{part.path}:{max(number, 1)}", reason, "json")


class _Window:
    """Text of a file from a place that moves on; of one item it holds at most `limit` characters and a block."""

    def __init__(self, file: io.BufferedReader, limit: int) -> None:
        self._file, self._limit = file, limit
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._parser = json.JSONDecoder()
        self._text, self._at, self._ended = "", 0, False

    def next(self) -> str:
        """The next character that is no space, or "" at the end of the file."""
        while True:
            space = SPACE.match(self._text, self._at)
            assert space is not None
            self._at = space.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._more(BUFFER)

    def take(self, character: str, *, needed: bool = True) -> bool:
        """Move past `character`, if it is the next one. Raises ValueError where it is needed and is not."""
        found = self.next()
        if found == character:
            self._at += 1
            return True
        if needed:
            raise ValueError(f"{character!r} is needed where " + (f"{found!r} stands" if found else "the file ends"))
        return False

    def item(self) -> object:
        """Parse one value. Raises ValueError for a broken one, OverflowError for one that is too long."""
        self.next()
        while True:
            try:
                value, end = self._parser.raw_decode(self._text, self._at)
                # A number at the end of the window may go on.
                if end < len(self._text) or self._ended:
                    self._at = end
                    return value
            except json.JSONDecodeError as error:
                if self._ended or not _goes_on(error, len(self._text)):
                    raise
            held = len(self._text) - self._at
            if held > self._limit:
                raise OverflowError
            self._more(max(BUFFER, held))

    def _more(self, size: int) -> None:
        """Add about `size` bytes; twice as much each time, since an item is parsed anew from its beginning."""
        pieces = [self._text[self._at :]]
        while size > 0 and not self._ended:
            block = self._file.read1(BUFFER)
            self._ended = not block
            pieces.append(self._decoder.decode(block, final=self._ended))
            size -= len(block)
        self._text, self._at = "".join(pieces), 0


def _goes_on(error: json.JSONDecodeError, size: int) -> bool:
    """Whether more text could mend it: the parser stopped near the end, or within a string that does not end."""
    return error.pos >= size - 16 or error.msg.startswith("Unterminated string")
