"""Raw text -> documents, in whatever form it comes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from llama_dist.data.inputs import Part, kind_of, list_inputs, of_no_kind, reader_of
from llama_dist.data.opening import BUFFER, DamagedFile, open_raw
from llama_dist.data.rows import MAX_DOCUMENT_BYTES, Document, Reading, Skipped, shortened
from llama_dist.errors import UserError

__all__ = ["MAX_DOCUMENT_BYTES", "Document", "Reading", "Skipped", "read_documents", "read_part", "with_line"]

AS_USUAL = Reading()


def read_part(part: Part, reading: Reading = AS_USUAL) -> Iterator[Document | Skipped]:
    """The documents of a part in their order, and in place of each that cannot be read what is wrong with it.

    A byte order mark at the beginning of a file is dropped, and in .txt a CRLF is read as a newline. Blank lines of
    .jsonl are no documents. What is in memory is a few times a document, or the unit of the format: a page of a
    .parquet column, a record batch of an .arrow file. Of a compressed file that is damaged or ends too
    early only a Skipped of kind "file" comes. Raises UserError for a file that is not there or that the disk or the
    network does not give, and for a table without the columns that `reading` names.
    """
    kind = kind_of(part.path)
    if kind is None:
        raise UserError(of_no_kind(part.path))
    came = False
    try:
        for item in reader_of(kind).read(part, reading):
            came = True
            yield item
        if not came and part == Part(part.path, bytes=part.bytes):
            yield Skipped(part.path, "the file has no documents", "empty")
    except DamagedFile as error:
        reason = f"the file is damaged ({shortened(str(error))}) and nothing of it is used; fetch it again"
        if came:  # only possible for a URL: the text that came already may be wrong
            raise UserError(f"{part.path}: the file is damaged ({shortened(str(error))}); leave it out") from error
        yield Skipped(part.path, reason, "file")
    except OSError as error:
        raise UserError(f"{part.path}: cannot be read: {error.strerror or error}") from error


def read_documents(paths: Iterable[str | Path], reading: Reading = AS_USUAL) -> Iterator[Document]:
    """The documents of all that `paths` name (see `list_inputs`), in order; empty ones are left out.

    Every path is looked at before the first document comes. Raises UserError at the first thing that cannot be read,
    with file and line, and at the end if nothing came.
    """
    inputs = list_inputs(list(paths))
    found = False
    for item in inputs:
        for document in read_part(Part(item.path), reading):
            if isinstance(document, Document):
                found = True
                yield document
            elif document.kind != "empty":
                raise UserError(str(document))
    if not found:
        names = ", ".join(item.path for item in inputs[:3]) + (", ..." if len(inputs) > 3 else "")
        raise UserError(f"{names}: no documents with text; give at least one file that has some")


def with_line(where: str) -> str:
    """"file@byte" of a Skipped or of an id as "file:line"; all else as it is. Reads the file up to there."""
    found = re.fullmatch(r"(.+)@(\d+)", where, re.DOTALL)
    if found is None or kind_of(found[1]) not in ("txt", "jsonl"):
        return where
    path, rest, lines = found[1], int(found[2]), 1
    try:
        with open_raw(path, sequential=True) as file:
            while rest and (block := file.read1(min(rest, BUFFER))):
                lines += block.count(b"\n")
                rest -= len(block)
    except (OSError, UserError):  # the file is gone: it was there when it was read
        return where
    return f"{path}:{lines}"
