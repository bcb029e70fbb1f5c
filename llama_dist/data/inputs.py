"""What there is to read: files, folders, globs, URLs and data sets, listed in a fixed order and cut into parts."""

from __future__ import annotations

import glob
import importlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from llama_dist.data.opening import COMPRESSIONS, NOT_THERE, compression_of, is_url, name_of, remote
from llama_dist.errors import UserError

DATASETS = "datasets:"
KINDS = {
    ".txt": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
UNKNOWN_BYTES = 64 << 20  # enough to be a piece of work by itself
PACKED = ("txt", "jsonl", "json", "csv")  # the kinds that may be compressed
ALLOWED = f"{', '.join(KINDS)}, and all but the last two with {', '.join(COMPRESSIONS)} too"
# They are imported by name when there is something for them: pyarrow takes a second, and datasets several.
READERS = {
    "txt": "llama_dist.data.lines",
    "jsonl": "llama_dist.data.lines",
    "json": "llama_dist.data.json_files",
    "csv": "llama_dist.data.csv_files",
    "parquet": "llama_dist.data.parquet_files",
    "arrow": "llama_dist.data.arrow_files",
    "datasets": "llama_dist.data.datasets_shards",
}
# What `datasets` and llama-dist write about the data beside it; in a folder these are no data.
ABOUT = ("dataset_info.json", "dataset_dict.json", "state.json", "manifest.json")


@dataclass(frozen=True)
class Input:
    """A file, a URL, or one shard of a data set of `datasets`.

    bytes: as it is stored; UNKNOWN_BYTES where a server does not say.
    """

    path: str
    bytes: int


@dataclass(frozen=True)
class Part:
    """What of an input is read at a time.

    start, stop: bytes of a .txt or .jsonl file (a document belongs to the part in which its line begins, a paragraph to
    the one in which the blank line before it begins), row groups of a .parquet file, record batches of an .arrow file;
    None: to the end. bytes: about how many of the stored bytes it stands for, to share out the work.
    """

    path: str
    start: int = 0
    stop: int | None = None
    bytes: int = 0


def list_inputs(patterns: Sequence[str | Path]) -> list[Input]:
    """The inputs that `patterns` name, in the order of the patterns, and within one sorted by path.

    A pattern is a file, a folder (stands for all files in it, at any depth, that are read here), a glob (`**` is any
    depth), a URL of one of these (whatever fsspec knows: https, s3, gs, hf, ...) or a data set as `datasets:PATH?name=
    ...&split=train` (see datasets_shards.py). Raises UserError for what cannot be an input or is named twice.
    """
    inputs: list[Input] = []
    named_by: dict[str, str] = {}
    for pattern in map(str, patterns):
        found = _list(pattern)
        for item in found:
            if item.path in named_by:
                raise UserError(
                    f"{item.path}: is named twice, by {named_by[item.path]} and by {pattern}, and would be read twice; "
                    "name it once"
                )
            named_by[item.path] = pattern
        inputs += found
    if not inputs:
        raise UserError(f"inputs: there are none; give at least one file of the kinds {ALLOWED}")
    return inputs


def cut(inputs: Iterable[Input], part_bytes: int) -> list[Part]:
    """All of the inputs, in order and each byte once, in parts of about `part_bytes`; a function of its arguments.

    Plain .txt and .jsonl files are cut at any byte, .parquet at row groups and .arrow at record batches; all else is
    one part.
    """
    if part_bytes < 1:
        raise UserError(f"part_bytes={part_bytes}: must be at least 1")
    parts: list[Part] = []
    for item in inputs:
        kind = kind_of(item.path)
        if item.bytes <= part_bytes or compression_of(item.path):
            parts.append(Part(item.path, bytes=item.bytes))
        elif kind in ("txt", "jsonl"):
            parts += _cut_bytes(item, part_bytes)
        elif kind in ("parquet", "arrow"):
            parts += reader_of(kind).cut(item, part_bytes)
        else:
            parts.append(Part(item.path, bytes=item.bytes))
    return parts


def kind_of(path: str) -> str | None:
    """Which reader is for it; None: no one."""
    if path.startswith(DATASETS):
        return "datasets"
    name = name_of(path)
    compression = compression_of(path)
    kind = KINDS.get(os.path.splitext(name.removesuffix(compression or ""))[1])
    return kind if compression is None or kind in PACKED else None


def of_no_kind(path: str) -> str:
    return (
        f"{path}: is not a kind of file that is read here; allowed are {ALLOWED}; "
        "rename plain text to .txt, or write other formats as .jsonl"
    )


def reader_of(kind: str) -> Any:
    """The module that reads a kind: `read(part, reading)` and, where files are cut by it, `cut(input, part_bytes)`."""
    return importlib.import_module(READERS[kind])


def even_bounds(total: int, count: int) -> list[tuple[int, int]]:
    """`count` stretches of nearly equal length that make up range(total)."""
    marks = [total * i // count for i in range(count + 1)]
    return list(zip(marks[:-1], marks[1:], strict=True))


def _cut_bytes(item: Input, part_bytes: int) -> list[Part]:
    if item.path.startswith("http") and not _has_ranges(item.path):
        return [Part(item.path, bytes=item.bytes)]
    bounds = even_bounds(item.bytes, -(-item.bytes // part_bytes))
    parts = [Part(item.path, start, stop, stop - start) for start, stop in bounds]
    # A file that grew since it was listed is still read to its end.
    return [*parts[:-1], Part(item.path, parts[-1].start, None, parts[-1].bytes)]


def _has_ranges(url: str) -> bool:
    """Whether a web server gives parts of this file; many give the whole, whatever they are asked for."""
    with remote(url):
        with fsspec.open(url, block_size=1).open() as file:
            file.seek(1)
            try:
                return len(file.read(1)) == 1
            except ValueError:
                return False


def _list(pattern: str) -> list[Input]:
    if pattern.startswith(DATASETS):
        shards: list[Input] = reader_of("datasets").list_shards(pattern)
        return shards
    if pattern.startswith("file://"):
        pattern = pattern.removeprefix("file://")
    if is_url(pattern):
        return _list_url(pattern)
    path = Path(pattern)
    if path.is_dir():
        return _of_known_kinds([p for p in path.rglob("*") if p.is_file()], pattern, "in this folder")
    if path.is_file():
        return [_input(str(path), path.stat().st_size)]
    if glob.has_magic(pattern):
        found = [Path(p) for p in glob.glob(pattern, recursive=True)]
        inside = [p for folder in found if folder.is_dir() for p in folder.rglob("*")]
        return _of_known_kinds({p for p in [*found, *inside] if p.is_file()}, pattern, "that it matches")
    if path.exists():
        raise UserError(f"{pattern}: is neither a file nor a folder, and must be read more than once; give a file")
    raise UserError(f"{pattern}: {NOT_THERE}; give a file of the kinds {ALLOWED}")


def _list_url(url: str) -> list[Input]:
    with remote(url):
        files, path = fsspec.core.url_to_fs(url)
        # In a web address a question mark begins the query.
        if "*" in path or (glob.has_magic(path) and not url.startswith("http")):
            found, where = files.glob(path, detail=True), "that it matches"
        elif kind_of(url) is None and files.isdir(path):
            found, where = files.find(path, detail=True), "in this folder"
        else:
            return [_input(url, _size(files.info(path)))]
    sizes = {
        files.unstrip_protocol(name): _size(info) for name, info in found.items() if info.get("type") != "directory"
    }
    kept = sorted(name for name in sizes if _is_data(name))
    if not kept:
        raise UserError(f"{url}: no file {where} is of the kinds {ALLOWED}; give one that has some")
    return [Input(name, sizes[name]) for name in kept]


def _size(info: dict[str, Any]) -> int:
    size = info.get("size")
    return UNKNOWN_BYTES if size is None else int(size)


def _of_known_kinds(found: Iterable[Path], pattern: str, where: str) -> list[Input]:
    files = sorted(file for file in found if _is_data(str(file)))
    if not files:
        raise UserError(f"{pattern}: no file {where} is of the kinds {ALLOWED}; give one that has some")
    return [Input(str(file), file.stat().st_size) for file in files]


def passed_over(patterns: Sequence[str | Path]) -> list[str]:
    """The files of folders on this machine, among `patterns`, that are of no kind that is read here; sorted."""
    folders = [Path(str(pattern).removeprefix("file://")) for pattern in patterns]
    inside = (path for folder in folders if folder.is_dir() for path in folder.rglob("*") if path.is_file())
    return sorted(str(path) for path in inside if not _is_data(str(path)))


def _is_data(path: str) -> bool:
    return kind_of(path) is not None and name_of(path) not in ABOUT


def _input(path: str, size: int) -> Input:
    if kind_of(path) is None:
        raise UserError(of_no_kind(path))
    return Input(path, size)
