"""Text files of every format that is read, made for tests."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda content: gzip.compress(content, mtime=0),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


def texts_of(count: int, *, seed: int = 0) -> list[str]:
    """Different texts of one line, of all kinds of letters."""
    draw = random.Random(seed)
    words = ("the", "cat,", '"sat"', "on", "a", "mat;", "café", "日本語", "😀", "a\tb", "{x}", "back\\slash")
    return [f"{i} " + " ".join(draw.choice(words) for _ in range(draw.randrange(1, 12))) for i in range(count)]


def rows_of(texts: Sequence[str]) -> list[dict[str, str]]:
    return [{"text": text} for text in texts]


def jsonl(texts: Sequence[str]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(rows_of(texts))).encode()


def json_array(texts: Sequence[str]) -> bytes:
    return json.dumps(rows_of(texts), indent=1).encode()


def separated(texts: Sequence[str], *, delimiter: str) -> bytes:
    table = io.StringIO()
    writer = csv.writer(table, delimiter=delimiter)
    writer.writerow(["n", "text"])
    writer.writerows([i, text] for i, text in enumerate(texts))
    return table.getvalue().encode()


def parquet(texts: Sequence[str], **options: object) -> bytes:
    buffer = io.BytesIO()
    table = pa.table({"n": list(range(len(texts))), "text": list(texts)})
    pq.write_table(table, buffer, row_group_size=16, **options)
    return buffer.getvalue()


def arrow(texts: Sequence[str], *, stream: bool) -> bytes:
    buffer = io.BytesIO()
    table = pa.table({"n": list(range(len(texts))), "text": list(texts)})
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(buffer, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=16):
            writer.write_batch(batch)
    return buffer.getvalue()


CONTENT: dict[str, Callable[[Sequence[str]], bytes]] = {
    ".txt": lambda texts: "".join(text + "\n" for text in texts).encode(),
    ".jsonl": jsonl,
    ".ndjson": jsonl,
    ".json": json_array,
    ".csv": lambda texts: separated(texts, delimiter=","),
    ".tsv": lambda texts: separated(texts, delimiter="\t"),
    ".parquet": parquet,
    ".checked.parquet": lambda texts: parquet(texts, write_page_checksum=True, use_dictionary=False),
    ".arrow": lambda texts: arrow(texts, stream=False),
    ".stream.arrow": lambda texts: arrow(texts, stream=True),
}


def _writer(content: Callable[[Sequence[str]], bytes], pack: Callable[[bytes], bytes]) -> Callable[..., Path]:
    def write(path: Path, texts: Sequence[str]) -> Path:
        path.write_bytes(pack(content(texts)))
        return path

    return write


# Suffix -> what writes a file of that format with those documents; the texts have no line ends.
WRITERS = {
    suffix + packed: _writer(content, pack)
    for suffix, content in CONTENT.items()
    for packed, pack in PACK.items()
    if not packed or suffix in (".txt", ".jsonl", ".json", ".csv")
}
