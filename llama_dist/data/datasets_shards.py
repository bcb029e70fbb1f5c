"""Text out of whatever `datasets.load_dataset` reads, local or from the hub, as a stream.

It is spelled `datasets:PATH?name=NAME&split=SPLIT&data_files=GLOB&data_dir=FOLDER&revision=REVISION`, as the arguments
of load_dataset; only PATH is needed, the split is "train", and data_files may come several times. Its shards (the files
that it is made of) are inputs of their own, written with `#1/8` behind.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl

import datasets

from llama_dist.data.inputs import DATASETS, UNKNOWN_BYTES, Input, Part
from llama_dist.data.rows import Document, Reading, Skipped, listed, make_document, shortened
from llama_dist.errors import UserError

ARGUMENTS = ("name", "split", "data_files", "data_dir", "revision")


def list_shards(spelled: str) -> list[Input]:
    """The shards of a data set. Raises UserError for one that cannot be found or is spelled wrongly."""
    if re.search(r"#\d+/\d+$", spelled):
        return [Input(spelled, UNKNOWN_BYTES)]
    dataset = _load(spelled)
    splits = dataset.info.splits or {}
    known = splits[dataset.split].num_bytes if dataset.split in splits else None
    count = dataset.num_shards
    size = known // count if known else UNKNOWN_BYTES
    return [Input(f"{spelled}#{i + 1}/{count}", size) for i in range(count)]


def read(part: Part, reading: Reading) -> Iterator[Document | Skipped]:
    """The rows of a shard. What `datasets` cannot read ends in a UserError: it does not say what is lost."""
    spelled, _, shard = part.path.rpartition("#")
    index, count = map(int, shard.split("/"))
    dataset = _load(spelled)
    if dataset.num_shards != count:
        raise UserError(f"{spelled}: had {count} shards and has {dataset.num_shards} now; start anew")
    if dataset.column_names is not None:
        dataset = dataset.select_columns(_columns(dataset.column_names, spelled, reading))
    with _named(part.path):
        rows = iter(dataset.shard(num_shards=count, index=index - 1))
    number = 0
    while True:
        number += 1
        where = f"{part.path}:{number}"
        with _named(where):
            row = next(rows, None)
        if row is None:
            return
        yield make_document(row, where, reading, halves=True)


@lru_cache(maxsize=1)
def _load(spelled: str) -> Any:
    """The data set as a stream; kept, since a process reads several shards of one and loading asks the hub."""
    path, _, query = spelled.removeprefix(DATASETS).partition("?")
    arguments: dict[str, Any] = {"split": "train"}
    try:
        pairs = parse_qsl(query, strict_parsing=True) if query else []
    except ValueError as error:
        raise UserError(f"{spelled}: {error}; write it as {DATASETS}PATH?name=NAME&split=SPLIT") from error
    for key, value in pairs:
        if key not in ARGUMENTS:
            raise UserError(f"{spelled}: {key} is not an argument here; allowed are {', '.join(ARGUMENTS)}")
        if key == "data_files":
            arguments.setdefault(key, []).append(value)
        else:
            arguments[key] = value
    if not path:
        raise UserError(f"{spelled}: names no data set; write it as {DATASETS}PATH?name=NAME&split=SPLIT")
    with _named(spelled):
        return datasets.load_dataset(path, streaming=True, **arguments)


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Whatever `datasets` raises becomes a UserError: each of its builders has errors of its own."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        text = f"{type(cause).__name__}: {shortened(str(cause))}"
        raise UserError(f"{where}: `datasets` cannot read it ({text}); check its name, split and files") from error


def _columns(names: list[str], spelled: str, reading: Reading) -> list[str]:
    missing = [name for name in (*reading.columns, *filter(None, [reading.id])) if name not in names]
    if missing:
        raise UserError(f'{spelled}: has no column "{missing[0]}"; it has {listed(names)}; choose one of these')
    return list(dict.fromkeys((*reading.columns, *filter(None, [reading.id_column(names)]))))
