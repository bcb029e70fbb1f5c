"""Text in .arrow files: Arrow's IPC file and stream formats; the latter is what `datasets` writes."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator

import pyarrow as pa

from llama_dist.data.arrow_rows import BROKEN, broken, columns_of, documents_of
from llama_dist.data.inputs import Input, Part, even_bounds
from llama_dist.data.opening import open_raw
from llama_dist.data.rows import Document, Reading, Skipped

FILE_MAGIC = b"ARROW1"
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def cut(item: Input, part_bytes: int) -> list[Part]:
    """Runs of record batches; a stream can only be read from its beginning and is one part."""
    count = 1
    try:
        with open_raw(item.path) as file:
            if file.peek(len(FILE_MAGIC)).startswith(FILE_MAGIC):
                count = pa.ipc.open_file(file).num_record_batches
    except BROKEN as error:
        broken(item.path, error)  # the reader will say what is wrong with it
    bounds = even_bounds(count, max(1, min(count, -(-item.bytes // part_bytes))))
    parts = [Part(item.path, start, stop, item.bytes * (stop - start) // max(count, 1)) for start, stop in bounds]
    return [*parts[:-1], Part(item.path, parts[-1].start, None, parts[-1].bytes)]


def read(part: Part, reading: Reading) -> Iterator[Document | Skipped]:
    """A row is called by the numbers of its batch and of its row within it, from 1."""
    with open_raw(part.path) as file:
        if file.peek(len(FILE_MAGIC)).startswith(FILE_MAGIC):
            yield from _read_file(file, part, reading)
        else:
            yield from _read_stream(file, part, reading)


def _read_file(file: io.BufferedReader, part: Part, reading: Reading) -> Iterator[Document | Skipped]:
    try:
        schema = pa.ipc.open_file(file).schema
        reader = pa.ipc.open_file(file, options=_options(schema, part, reading))
    except BROKEN as error:
        yield broken(part.path, error)
        return
    for number in range(part.start, reader.num_record_batches if part.stop is None else part.stop):
        try:
            batch = reader.get_batch(number)
        except BROKEN as error:
            yield broken(f"{part.path}:{number + 1}", error)
        else:
            yield from _documents(batch, number, part, reading)


def _read_stream(file: io.BufferedReader, part: Part, reading: Reading) -> Iterator[Document | Skipped]:
    number = 0
    try:
        schema = pa.ipc.open_stream(file).schema
        file.seek(0)
        reader = pa.ipc.open_stream(file, options=_options(schema, part, reading))
        while True:
            try:
                batch = reader.read_next_batch()
            except StopIteration:
                break
            yield from _documents(batch, number, part, reading)
            number += 1
        file.seek(max(file.tell() - len(END_OF_STREAM), 0), os.SEEK_SET)
        if file.read(len(END_OF_STREAM) + 1) != END_OF_STREAM:
            raise ValueError("the mark of the end is not at the end of the file: batches may be missing")
    except BROKEN as error:
        yield broken(f"{part.path}:{number + 1}", error)


def _documents(batch: pa.RecordBatch, number: int, part: Part, reading: Reading) -> Iterator[Document | Skipped]:
    return documents_of(batch, lambda row: f"{part.path}:{number + 1}:{row + 1}", reading)


def _options(schema: pa.Schema, part: Part, reading: Reading) -> pa.ipc.IpcReadOptions:
    """Read the columns that are needed and no others."""
    columns = columns_of(schema, part.path, reading)
    return pa.ipc.IpcReadOptions(included_fields=[schema.names.index(name) for name in columns], use_threads=False)
