"""Each format gives the documents that were written, and what is wrong with a row costs that row alone."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os
import random
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from text_helpers import WRITERS, jsonl, texts_of

from llama_dist.data.documents import Document, Reading, Skipped, read_documents, read_part
from llama_dist.data.inputs import Part, cut, list_inputs
from llama_dist.errors import UserError


def read(file: Path | str, reading: Reading | None = None) -> list[Document | Skipped]:
    reading = reading or Reading()
    return [item for part in cut(list_inputs([file]), 1 << 30) for item in read_part(part, reading)]


def outline(items: list[Document | Skipped]) -> list[str]:
    """The texts, and in brackets the kinds of what was skipped."""
    return [item.text if isinstance(item, Document) else f"[{item.kind}]" for item in items]


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_texts(tmp_path: Path, suffix: str) -> None:
    texts = texts_of(100)
    file = WRITERS[suffix](tmp_path / f"A{suffix.upper()}", texts)
    items = read(file, Reading(txt="line"))
    assert outline(items) == texts
    assert len({item.id for item in items if isinstance(item, Document)}) == 100


def test_compressed_in_several_pieces(tmp_path: Path) -> None:
    texts = texts_of(60)
    first, second = jsonl(texts[:30]), jsonl(texts[30:])
    frames = zstandard.ZstdCompressor()
    skippable = struct.pack("<II", 0x184D2A50, 4) + b"abcd"
    wide = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    pieces = {
        "a.jsonl.gz": gzip.compress(first) + gzip.compress(second) + b"\0" * 20,
        "b.jsonl.bz2": bz2.compress(first) + bz2.compress(second),
        "c.jsonl.xz": lzma.compress(first) + lzma.compress(second),
        "d.jsonl.zst": skippable + frames.compress(first) + skippable + frames.compress(second),
        "e.jsonl.zst": zstandard.ZstdCompressor(compression_params=wide).compress(first + second),
    }
    for name, content in pieces.items():
        (tmp_path / name).write_bytes(content)
        assert outline(read(tmp_path / name)) == texts, name


def test_json_arrays(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    long = "é" * 3_000_000  # longer than the window that it is parsed in
    content = [{"text": "a"}, {"text": long, "id": "two"}, 5, {"text": None}, {"text": "[]}"}, {"text": "\ud83d"}]
    file.write_text("\ufeff \n" + json.dumps(content, indent=2) + "\n ")
    items = read(file)
    assert outline(items) == ["a", long, "[column]", "[column]", "[]}", "[encoding]"]
    assert isinstance(items[0], Document) and items[0].id == f"{file}:1"
    assert isinstance(items[1], Document) and items[1].id == "two"

    good = b'[{"text": "a"}, {"text": "b"}'
    for broken, kinds in {
        b"": ["a", "b", "[json]"],
        b', {"text": "c"': ["a", "b", "[json]"],
        b', {"text" 5}, {"text": "d"}]': ["a", "b", "[json]"],
        b'] {"text": "c"}': ["a", "b", "[json]"],
        b' {"text": "c"}]': ["a", "b", "[json]"],
        b', {"text": "caf\xe9"}, {"text": "d"}]': ["a", "b", "[encoding]", "d"],
        b', {"text": "' + b"x" * 3_000_000 + b'"}, {"text": "d"}]': ["a", "b", "[too_long]"],
        b", " + b"[" * 200_000: ["a", "b", "[json]"],
        b", " + b"9" * 200_000 + b"]": ["a", "b", "[json]"],
    }.items():
        file.write_bytes(good + broken)
        assert outline(read(file, Reading(max_document_bytes=1_000))) == kinds, broken[:40]
    file.write_bytes(b'{"text": "a"}\n{"text": "b"}\n')
    assert outline(read(file)) == ["a", "b"]
    file.write_bytes(b'{\n"text": "a"\n}\n')
    assert outline(read(file)) == ["[json]"] * 3


def test_csv_rows(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    rows = ['"a, ""b""\r\nc",1', "", "d,2", "e", "f,3,4", '"g"h,5', "caf\xe9,6", "n\0l,7", ",8", "last,9"]
    file.write_bytes(("\xef\xbb\xbftext,n\r\n" + "\r\n".join(rows)).encode("latin-1"))
    items = read(file)
    kinds = ["[csv]", "[csv]", "[csv]", "[encoding]", "[nul]", "[empty]"]
    if sys.version_info < (3, 11):
        kinds[4] = "[csv]"  # this reader refuses a NUL by itself
    assert outline(items) == ['a, "b"\r\nc', "d", *kinds, "last"]
    wheres = [item.id if isinstance(item, Document) else item.where for item in items]
    assert wheres == [f"{file}:{line}" for line in (2, 5, 6, 7, 8, 9, 10, 11, 12)]

    file.write_text("text\n" + '"open\n' + "x" * 3_000 + "\nanother\n" * 3)
    assert outline(read(file, Reading(max_document_bytes=1_000)))[:2] == ["[too_long]", "another"]
    file.write_text("text\na\n" + '"open\nb\nc\n')
    assert outline(read(file)) == ["a", "[csv]"]
    with csv_limit():
        file.write_text("text\n" + "x" * 500_000 + "\n")  # beyond the csv module's own limit
        assert outline(read(file)) == ["x" * 500_000]


class csv_limit:
    """The csv module's limit is that of the process: it is put back."""

    def __enter__(self) -> None:
        self.limit = csv.field_size_limit(131_072)

    def __exit__(self, *error: object) -> None:
        csv.field_size_limit(self.limit)


TYPES = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.large_binary(),
    pa.dictionary(pa.int8(), pa.string()),
    pa.dictionary(pa.int32(), pa.large_string()),
]


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_types_of_text_in_tables(tmp_path: Path, kind: pa.DataType) -> None:
    values = ["a", None, "é", "", "n\0l", "x" * 50, "a"]
    if pa.types.is_dictionary(kind):
        column = pa.array(values, kind.value_type).dictionary_encode().cast(kind)
    else:
        column = pa.array([v if v is None else v.encode() for v in values], pa.binary()).cast(kind)
    table = pa.table({"id": list(range(7)), "text": column, "other": [[1]] * 7})
    for name in write_tables(tmp_path, table):
        items = read(tmp_path / name, Reading(max_document_bytes=20))
        assert outline(items) == ["a", "[column]", "é", "[empty]", "[nul]", "[too_long]", "a"], name
        assert isinstance(items[2], Document) and items[2].id == "2"


def write_tables(folder: Path, table: pa.Table) -> list[str]:
    pq.write_table(table, folder / "t.parquet", row_group_size=3)
    for name, new in {"file.arrow": pa.ipc.new_file, "stream.arrow": pa.ipc.new_stream}.items():
        with new(str(folder / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    return ["t.parquet", "file.arrow", "stream.arrow"]


def test_bytes_that_are_no_text_cost_their_row(tmp_path: Path) -> None:
    content = pa.array([b"a", b"caf\xe9", b"c", b"\xed\xa0\x80"]).view(pa.string())
    for name in write_tables(tmp_path, pa.table({"text": content})):
        items = read(tmp_path / name)
        assert outline(items) == ["a", "[encoding]", "c", "[encoding]"], name
    assert isinstance(items[1], Skipped) and items[1].where == f"{tmp_path}/stream.arrow:1:2"
    assert read(tmp_path / "t.parquet")[3] == Skipped(f"{tmp_path}/t.parquet:4", items[3].reason, "encoding")


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".arrow", ".stream.arrow"])
def test_a_table_without_the_column_is_refused(tmp_path: Path, suffix: str) -> None:
    file = WRITERS[suffix](tmp_path / f"a{suffix}", texts_of(3))
    for reading in (Reading(text="body"), Reading(template="{n} {body}"), Reading(id="body")):
        with pytest.raises(UserError, match=rf'{suffix}: has no column "body"; .* \'n\', \'text\'; choose'):
            read(file, reading)
    if suffix != ".csv":
        with pytest.raises(UserError, match='the column "n" holds int64 and no text'):
            read(file, Reading(text="n"))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".arrow", ".stream.arrow"])
def test_templates_and_ids(tmp_path: Path, suffix: str) -> None:
    rows = [{"q": "1+1?", "a": 2, "key": "x"}, {"q": None, "a": 3, "key": "y"}, {"q": "é", "a": 4, "key": "z"}]
    file = tmp_path / f"a{suffix}"
    if suffix in (".jsonl", ".json"):
        file.write_text("\n".join(map(json.dumps, rows)) if suffix == ".jsonl" else json.dumps(rows))
    elif suffix == ".csv":
        file.write_text("q,a,key\n1+1?,2,x\nonly two,3\né,4,z\n")
    elif suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        table = pa.Table.from_pylist(rows)
        with (pa.ipc.new_stream if "stream" in suffix else pa.ipc.new_file)(str(file), table.schema) as writer:
            writer.write_table(table)
    items = read(file, Reading(template="Q: {q}\n{{A}}: {a}", id="key"))
    assert outline(items) == ["Q: 1+1?\n{A}: 2", "[csv]" if suffix == ".csv" else "[column]", "Q: é\n{A}: 4"]
    assert [item.id for item in items if isinstance(item, Document)] == ["x", "z"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"template": "{}"}, "is not just the name of a column"),
        ({"template": "{a!r}"}, "{a!r} is not just the name"),
        ({"template": "{a:5}"}, "{a:5} is not just the name"),
        ({"template": "{a"}, "write a brace itself as {{"),
        ({"template": "no column"}, "names no column"),
        ({"txt": "page"}, "must be one of file, line, paragraph"),
        ({"max_document_bytes": 0}, "must be at least 1"),
    ],
)
def test_a_reading_that_makes_no_sense_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as refused:
        Reading(**values)  # type: ignore[arg-type]
    assert message in str(refused.value)


def test_what_datasets_reads(tmp_path: Path) -> None:
    texts = texts_of(90)
    for i in range(3):
        (tmp_path / f"part{i}.jsonl").write_bytes(jsonl(texts[30 * i : 30 * i + 30]))
    spelled = f"datasets:json?data_files={tmp_path}/part0.jsonl&data_files={tmp_path}/part[12].jsonl"
    inputs = list_inputs([spelled])
    assert [item.path for item in inputs] == [f"{spelled}#{i}/3" for i in (1, 2, 3)]
    assert [len(list(read_part(part))) for part in cut(inputs, 1)] == [30, 30, 30]
    documents = list(read_documents([spelled]))
    assert [d.text for d in documents] == texts and documents[31].id == f"{spelled}#2/3:2"
    with pytest.raises(UserError, match='has no column "body"; it has \'text\''):
        list(read_documents([spelled], Reading(text="body")))
    with pytest.raises(UserError, match="had 2 shards and has 3 now"):
        list(read_part(Part(f"{spelled}#1/2")))
    (tmp_path / "part1.jsonl").write_bytes(b'{"text": "a"}\n{"text": "b\n')
    with pytest.raises(UserError, match="#2/3:1: `datasets` cannot read it"):
        list(read_documents([spelled]))


def test_what_datasets_writes(tmp_path: Path) -> None:
    texts = texts_of(40)
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "saved"), num_shards=2)
    assert [d.text for d in read_documents([tmp_path / "saved"])] == texts


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".json", ".csv", ".jsonl.gz", ".txt.zst"])
def test_memory_is_bounded(tmp_path: Path, suffix: str) -> None:
    """A line of 64 MiB among others, and many documents."""
    limit, size = 1 << 20, 64 << 20
    texts = texts_of(10)
    small = WRITERS[suffix.split(".g")[0].split(".z")[0]](tmp_path / "small", texts).read_bytes()
    content = small + b"x" * size + b"\n"
    packed = {"gz": lambda c: gzip.compress(c, 1), "zst": zstandard.compress}.get(suffix.rsplit(".", 1)[1], bytes)
    (tmp_path / f"a{suffix}").write_bytes(packed(content))
    del content
    reading = Reading(txt="line", max_document_bytes=limit)
    tracemalloc.start()
    try:
        found = outline(read(tmp_path / f"a{suffix}", reading))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found[:10] == texts and len(found) == 11
    assert peak < (48 if suffix.endswith(".zst") else 12) * limit, f"{peak >> 20} MiB"  # see ZSTD_BLOCK


def test_memory_of_a_parquet_file_is_that_of_a_few_pages(tmp_path: Path) -> None:
    draw = random.Random(0)
    texts = [draw.randbytes(1_000).hex() for _ in range(20_000)]  # 40 MB in one row group
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    before, held = pa.total_allocated_bytes(), 0
    for i, item in enumerate(read_part(Part(str(tmp_path / "a.parquet")))):
        assert isinstance(item, Document) and item.text == texts[i]
        held = max(held, pa.total_allocated_bytes() - before)
    assert 0 < held < 10_000_000, held


def test_formats_are_imported_when_they_are_met(tmp_path: Path) -> None:
    """pyarrow and datasets take long; neither --help nor plain text may wait for them."""
    file = WRITERS[".jsonl.gz"](tmp_path / "a.jsonl.gz", texts_of(3))
    code = (
        "import sys, llama_dist.data.documents as d\n"
        f"assert len(list(d.read_documents([{str(file)!r}]))) == 3\n"
        "print([m for m in ('pyarrow', 'datasets', 'pandas', 'aiohttp', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert (done.stdout, done.stderr) == ("[]\n", "")
