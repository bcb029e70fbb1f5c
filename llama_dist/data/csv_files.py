"""Text in .csv and .tsv files: a row of column names, then a document on each row; quoted as RFC 4180 says."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from llama_dist.data.inputs import Part
from llama_dist.data.lines import lines_of
from llama_dist.data.opening import compression_of, name_of, open_input
from llama_dist.data.rows import Document, Reading, Skipped, listed, make_document, shortened
from llama_dist.errors import UserError


class _Abort(Exception):
    """A line within a row that cannot be read."""

    def __init__(self, skipped: Skipped) -> None:
        super().__init__(str(skipped))
        self.skipped = skipped


def read(part: Part, reading: Reading) -> Iterator[Document | Skipped]:
    """A row is called by the line on which it begins. Raises UserError where the first row lacks a column's name.

    That a file is cut short can only be seen where a quote is open or fields are missing.
    """
    with open_input(part.path, sequential=True) as file:
        source = _Source(file, part, reading)
        delimiter = "\t" if name_of(part.path).removesuffix(compression_of(part.path) or "").endswith(".tsv") else ","
        # The library's own limit is one for the whole process; `source` has the limit that is meant here.
        csv.field_size_limit(max(csv.field_size_limit(), reading.max_document_bytes + 1))
        rows = csv.reader(source, delimiter=delimiter, strict=True)
        names: list[str] | None = None
        while True:
            source.begin()
            try:
                row = next(rows, None)
            except (_Abort, csv.Error) as error:
                skipped = _told(error, source.where)
                if names is None:
                    raise UserError(f"{skipped}; the first row must name the columns") from error
                yield skipped
                continue
            if row is None:
                return
            if not row:
                continue  # a blank line
            if names is None:
                names = row
                _check_names(names, part, reading)
            elif len(row) != len(names):
                yield Skipped(source.where, f"has {len(row)} fields and not {len(names)}, as the first row", "csv")
            else:
                yield make_document(dict(zip(names, row, strict=True)), source.where, reading, halves=source.halves)


class _Source:
    """The lines of a file as text for `csv`, where bytes that are not UTF-8 are half surrogates.

    Raises _Abort for a line or a row that is too long: an open quote must not swallow the file.
    """

    def __init__(self, file: io.BufferedReader, part: Part, reading: Reading) -> None:
        self._lines = lines_of(file, part, reading, stop=None)
        self._limit = reading.max_document_bytes
        self._path = self.where = part.path
        self._fresh = True
        self._held = 0
        self.halves = False

    def begin(self) -> None:
        """A new row begins with the next line."""
        self._fresh, self._held, self.halves = True, 0, False

    def __iter__(self) -> _Source:
        return self

    def __next__(self) -> str:
        number, _, content = next(self._lines)
        if self._fresh:
            self.where, self._fresh = f"{self._path}:{number}", False
        if isinstance(content, Skipped):
            raise _Abort(Skipped(self.where, content.reason, content.kind))
        self._held += len(content)
        if self._held > self._limit + 1:
            reason = f"the row is longer than max_document_bytes={self._limit}; raise it, or see which quote is open"
            raise _Abort(Skipped(self.where, reason, "too_long"))
        text = content.decode(errors="surrogateescape")
        self.halves = self.halves or not text.isascii()
        return text


def _told(error: Exception, where: str) -> Skipped:
    if isinstance(error, _Abort):
        return error.skipped
    return Skipped(where, f"broken quotes or line ends ({shortened(str(error))})", "csv")


def _check_names(names: list[str], part: Part, reading: Reading) -> None:
    missing = [name for name in reading.columns if name not in names]
    if missing or (reading.id is not None and reading.id not in names):
        name = (missing or [reading.id])[0]
        raise UserError(f'{part.path}: has no column "{name}"; the first row has {listed(names)}; choose one of these')
    double = [name for name in reading.columns if names.count(name) > 1]
    if double:
        raise UserError(f'{part.path}: has the column "{double[0]}" more than once; rename one of them')
