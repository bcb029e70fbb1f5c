"""Raw text -> documents: a .txt file is one, a .jsonl file has one a line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llama_dist.errors import UserError

SUFFIXES = (".txt", ".jsonl")
BOM = "\ufeff"


@dataclass(frozen=True)
class Document:
    """A text that stands by itself; `id` says where it came from."""

    id: str
    text: str


def read_documents(paths: Iterable[str | Path]) -> Iterator[Document]:
    """The documents of .txt and .jsonl files (`{"text": ..., "id": optional}`), in order; empty ones are left out.

    A folder stands for all such files in it, sorted by path. A byte order mark is dropped, and in .txt a CRLF is read
    as a newline. Every path is looked at before the first document comes. Raises UserError with file and line for a
    missing file, another suffix, invalid UTF-8, broken JSON or a line without text, and at the end if nothing came.
    """
    files = list_files(paths)
    found = False
    for file in files:
        for document in _read_txt(file) if file.suffix == ".txt" else _read_jsonl(file):
            if document.text:
                found = True
                yield document
    if not found:
        names = ", ".join(map(str, files[:3])) + (", ..." if len(files) > 3 else "")
        raise UserError(f"{names}: no documents with text; give at least one non-empty {' or '.join(SUFFIXES)} file")


def list_files(paths: Iterable[str | Path]) -> list[Path]:
    """The files behind `paths`, with folders opened. Raises UserError for what cannot be an input."""
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
            if not inside:
                raise UserError(f"{path}: no {' or '.join(SUFFIXES)} file in this folder; give one that has some")
            files += inside
        elif not path.is_file():
            raise UserError(f"{path}: there is no such file; give the path of a {' or '.join(SUFFIXES)} file")
        elif path.suffix not in SUFFIXES:
            raise UserError(
                f"{path}: is not a kind of file that is read here; allowed are {', '.join(SUFFIXES)}; "
                "rename plain text to .txt, or write other formats as .jsonl"
            )
        else:
            files.append(path)
    if not files:
        raise UserError(f"inputs: there are none; give at least one {' or '.join(SUFFIXES)} file")
    return files


def _read_txt(file: Path) -> Iterator[Document]:
    yield Document(str(file), _decode(file.read_bytes(), file, line=1, offset=0).replace("\r\n", "\n"))


def _read_jsonl(file: Path) -> Iterator[Document]:
    offset = 0
    with file.open("rb") as lines:
        for number, content in enumerate(lines, start=1):
            line = _decode(content, file, line=number, offset=offset)
            if line.strip():
                yield _parse(line, f"{file}:{number}")
            offset += len(content)


def _decode(content: bytes, file: Path, *, line: int, offset: int) -> str:
    """`content` begins on line `line` of `file`, at byte `offset`; a byte order mark at the very beginning goes."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        raise UserError(
            f"{file}:{line}: byte {offset + error.start} of the file (0x{content[error.start]:02x}) is not UTF-8; "
            "only UTF-8 is read; convert the file, for example with `iconv -f LATIN1 -t UTF-8`"
        ) from error
    return text.removeprefix(BOM) if offset == 0 else text


def _parse(line: str, where: str) -> Document:
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{where}: not valid JSON ({error}); each line must be {{"text": "..."}}') from error
    text = item.get("text") if isinstance(item, dict) else None
    if not isinstance(text, str):
        found = f"keys {', '.join(map(repr, item)) or 'none'}" if isinstance(item, dict) else type(item).__name__
        raise UserError(f'{where}: no string "text" (found: {found}); each line must be {{"text": "..."}}')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: character {error.start} of the text is half a surrogate pair ({text[error.start]!r}), "
            "which is not text; write the whole character"
        ) from error
    return Document(str(item.get("id", where)), text)
