"""Text in .parquet files, by row groups."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow.parquet as pq

from llama_dist.data.arrow_rows import BROKEN, broken, columns_of, documents_of
from llama_dist.data.inputs import Input, Part
from llama_dist.data.opening import BUFFER, open_raw
from llama_dist.data.rows import Document, Reading, Skipped

BATCH_BYTES = 4 << 20
# Rows may be far longer than their column takes in the file, where equal ones are stored once.
MAX_BATCH_ROWS = 64


def cut(item: Input, part_bytes: int) -> list[Part]:
    """Row groups in runs of about `part_bytes` as they are stored."""
    try:
        with open_raw(item.path) as file:
            footer = pq.ParquetFile(file).metadata
            sizes = [max(footer.row_group(i).total_byte_size, 1) for i in range(footer.num_row_groups)]
    except BROKEN as error:
        broken(item.path, error)
        return [Part(item.path, bytes=item.bytes)]  # the reader will say what is wrong with it
    parts: list[Part] = []
    scale = item.bytes / max(sum(sizes), 1)
    start, held = 0, 0
    for group, size in enumerate(sizes):
        if held and (held + size) * scale > part_bytes:
            parts.append(Part(item.path, start, group, round(held * scale)))
            start, held = group, 0
        held += size
    return [*parts, Part(item.path, start, None, round(held * scale))]


def read(part: Part, reading: Reading) -> Iterator[Document | Skipped]:
    """A row is called by its number in the file. What is wrong within a row group costs the rest of that group."""
    with open_raw(part.path) as source:
        try:
            file = pq.ParquetFile(source, pre_buffer=False, buffer_size=BUFFER, page_checksum_verification=True)
            groups = range(part.start, file.num_row_groups if part.stop is None else part.stop)
            before = sum(file.metadata.row_group(i).num_rows for i in range(min(part.start, file.num_row_groups)))
            columns = columns_of(file.schema_arrow, part.path, reading)
        except BROKEN as error:
            yield broken(part.path, error)
            return
        for group in groups:
            rows = 0
            total = 1
            try:
                total = file.metadata.row_group(group).num_rows
                batches = file.iter_batches(
                    batch_size=_batch_rows(file, group),
                    row_groups=[group],
                    columns=columns,
                    use_threads=False,
                )
                for batch in batches:
                    first = before + rows + 1
                    yield from documents_of(batch, lambda row, first=first: f"{part.path}:{first + row}", reading)
                    rows += batch.num_rows
                if rows != total:
                    raise ValueError(f"row group {group} has {rows} rows and should have {total}")
            except BROKEN as error:
                yield broken(f"{part.path}:{before + rows + 1}", error, total - rows)
            before += total


def _batch_rows(file: pq.ParquetFile, group: int) -> int:
    """How many rows to unpack at a time. Of the columns nothing is asked: a wrong bit there would end the process."""
    about = file.metadata.row_group(group)
    return max(1, min(MAX_BATCH_ROWS, BATCH_BYTES * max(about.num_rows, 1) // max(about.total_byte_size, 1)))
