"""What is named is found in a fixed order, wherever it lies, and any cutting of it reads the same."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from text_helpers import WRITERS, texts_of

from llama_dist.data.documents import Document, Reading, Skipped, read_documents, read_part, with_line
from llama_dist.data.inputs import Input, Part, cut, list_inputs, passed_over
from llama_dist.errors import UserError


class Quiet(SimpleHTTPRequestHandler):
    """A server that gives whole files, whatever range it is asked for."""

    def log_message(self, format: str, *args: object) -> None:
        pass


class Ranges(Quiet):
    """One that gives the range that it is asked for."""

    def do_GET(self) -> None:
        first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        if not last:
            return super().do_GET()
        content = Path(self.translate_path(self.path)).read_bytes()
        piece = content[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(piece) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(piece)))
        self.end_headers()
        self.wfile.write(piece)
        return None


@pytest.fixture(params=[Quiet, Ranges])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of a server of `tmp_path`/www, without and with ranges."""
    (tmp_path / "www").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(request.param, directory=str(tmp_path / "www")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def make_tree(folder: Path) -> Path:
    (folder / "sub/deep").mkdir(parents=True)
    for name in ("b.txt", "a.jsonl", "sub/c.jsonl.gz", "sub/deep/d.parquet", "e [1].csv"):
        suffix = "".join(Path(name).suffixes)
        WRITERS[suffix](folder / name, [f"{name} is here"])
    for name in ("note.md", "image.png", "sub/dataset_info.json", "state.json", "model.bin.gz", "t.parquet.gz"):
        (folder / name).write_bytes(b"{}")
    return folder


def names(inputs: list[Input]) -> list[str]:
    return [Path(item.path).name for item in inputs]


def test_files_folders_and_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tree(tmp_path / "f")
    everything = ["a.jsonl", "b.txt", "e [1].csv", "c.jsonl.gz", "d.parquet"]
    assert names(list_inputs([tmp_path / "f"])) == everything
    assert list_inputs([tmp_path / "f/a.jsonl"]) == [Input(str(tmp_path / "f/a.jsonl"), 28)]
    monkeypatch.chdir(tmp_path)
    assert [item.path for item in list_inputs(["f/*.txt", "f/a.jsonl"])] == ["f/b.txt", "f/a.jsonl"]
    assert names(list_inputs(["f/**/*.jsonl*"])) == ["a.jsonl", "c.jsonl.gz"]
    assert names(list_inputs(["f/e [1].csv"])) == ["e [1].csv"]  # a file of that name, before a glob
    assert names(list_inputs(["f/s*"])) == ["c.jsonl.gz", "d.parquet"]
    assert names(list_inputs(["f/*"])) == everything
    assert names(list_inputs([f"file://{tmp_path}/f/b.txt"])) == ["b.txt"]


BAD = {
    "absent.txt": "absent.txt: there is no such file; give a file of the kinds .txt",
    "f/note.md": r"note.md: is not a kind of file that is read here; allowed are .txt, .*\.zst",
    "f/t.parquet.gz": "t.parquet.gz: is not a kind of file",
    "f/*.md": r"f/\*.md: no file that it matches is of the kinds .txt",
    "f/none*": r"f/none\*: no file that it matches",
    "nothing": "nothing: no file in this folder is of the kinds .txt",
    "f/a.*": "f/a.jsonl: is named twice, by f/a.jsonl and by f/a.*, and would be read twice",
    "memory://absent/x.txt": "memory://absent/x.txt: there is no such file; check the URL",
    "memory://absent/*.txt": r"memory://absent/\*.txt: no file that it matches",
    "http://127.0.0.1:1/x.txt": "http://127.0.0.1:1/x.txt: ",
    "nosuch://x/y.txt": "nosuch://x/y.txt: .*nosuch",
    "datasets:": "datasets:: names no data set",
    "datasets:json?splits=x": "datasets:json.splits=x: splits is not an argument here; allowed are name, split",
    "datasets:json?x": "datasets:json.x: .*write it as datasets:PATH",
    "datasets:json?data_files=absent.jsonl": "datasets:json.data_files=absent.jsonl: `datasets` cannot read it",
}


@pytest.mark.parametrize("pattern", BAD)
def test_what_cannot_be_an_input_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    make_tree(tmp_path / "f")
    (tmp_path / "nothing").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=BAD[pattern]):
        list_inputs(["f/a.jsonl", pattern])


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match="pipe.txt: is neither a file nor a folder"):
        list_inputs([tmp_path / "pipe.txt"])


def test_memory_urls() -> None:
    files = fsspec.filesystem("memory")
    for name in ("/m/a.jsonl", "/m/sub/b.txt", "/m/readme.md"):
        with files.open(name, "wb") as file:
            file.write(b"".join(b'{"text": "%d"}\n' % i for i in range(30)) if name.endswith("jsonl") else b"words")
    try:
        assert [i.path for i in list_inputs(["memory://m"])] == ["memory:///m/a.jsonl", "memory:///m/sub/b.txt"]
        assert [i.path for i in list_inputs(["memory://m/*.jsonl"])] == ["memory:///m/a.jsonl"]
        parts = cut(list_inputs(["memory://m/a.jsonl"]), 50)
        assert len(parts) > 5
        read = [item for part in parts for item in read_part(part)]
        assert [item.text for item in read if isinstance(item, Document)] == [str(i) for i in range(30)]
        assert [with_line(d.id) for d in read if isinstance(d, Document)][-1] == "memory://m/a.jsonl:30"
    finally:
        files.rm("/m", recursive=True)


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".jsonl.gz", ".csv.zst", ".json", ".parquet", ".stream.arrow"])
def test_http(tmp_path: Path, url: str, suffix: str, request: pytest.FixtureRequest) -> None:
    texts = texts_of(40)
    WRITERS[suffix](tmp_path / f"www/a{suffix}", texts)
    inputs = list_inputs([f"{url}/a{suffix}?download=true"])
    assert inputs[0].bytes == (tmp_path / f"www/a{suffix}").stat().st_size
    parts = cut(inputs, 500)
    ranges = "Ranges" in request.node.name
    assert len(parts) > 2 if ranges and suffix in (".jsonl", ".txt", ".parquet") else len(parts) >= 1
    read = [item for part in parts for item in read_part(part, Reading(txt="line"))]
    assert [item.text for item in read if isinstance(item, Document)] == texts
    assert len(read) == len(texts)


def test_a_url_that_fails_is_named(tmp_path: Path, url: str) -> None:
    with pytest.raises(UserError, match="x.txt: there is no such file; check the URL"):
        list(read_part(Part(f"{url}/x.txt")))
    raw = WRITERS[".jsonl.gz"](tmp_path / "whole.jsonl.gz", texts_of(40)).read_bytes()
    (tmp_path / "www/a.jsonl.gz").write_bytes(raw[:-30])
    try:
        found = list(read_part(Part(f"{url}/a.jsonl.gz")))
        assert [item.kind for item in found if isinstance(item, Skipped)] == ["file"] and len(found) == 1
    except UserError as error:
        assert "a.jsonl.gz: the file is damaged (it ends too early)" in str(error)


def lines_at_random(draw: random.Random) -> bytes:
    """Lines of all sorts: blank, long, broken, with other ends, and with no end of the last."""
    sorts = (
        b'{"text": "%d"}' % draw.randrange(999),
        '{"id": "é", "text": "é\\u00e9"}'.encode(),
        b"",
        b"",
        b"  ",
        b"word",
        b"two words",
        b"caf\xe9",
        b'{"text": ""}',
        b"x" * draw.randrange(60),
        b"\0",
    )
    lines = [draw.choice(sorts) + draw.choice((b"\n", b"\n", b"\r\n")) for _ in range(draw.randrange(12))]
    return draw.choice((b"", b"\xef\xbb\xbf")) + b"".join(lines) + draw.choice((b"", b"end", b'{"text": "end"}'))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt:line", "a.txt:paragraph", "a.txt:file"])
def test_any_cutting_gives_the_same(tmp_path: Path, name: str) -> None:
    name, _, txt = name.partition(":")
    reading = Reading(txt=txt or "file", max_document_bytes=40)  # type: ignore[arg-type]
    draw = random.Random(name + txt)
    file = tmp_path / name
    for _ in range(60):
        content = lines_at_random(draw)
        file.write_bytes(content)
        whole = list(read_part(Part(str(file)), reading))
        size = len(content)
        cuts = [range(0, size, step) for step in (1, 2, 7)] + [sorted(draw.sample(range(size), min(3, size)))]
        for marks in cuts:
            bounds = sorted({0, *marks})
            parts = [Part(str(file), a, b) for a, b in zip(bounds, [*bounds[1:], None], strict=True)]
            read = [named_by_line(item) for part in parts for item in read_part(part, reading)]
            told = [item for item in read if not (isinstance(item, Skipped) and "file has no" in item.reason)]
            assert told == [i for i in whole if not (isinstance(i, Skipped) and "file has no" in i.reason)], content


def named_by_line(item: Document | Skipped) -> Document | Skipped:
    if isinstance(item, Skipped):
        return Skipped(with_line(item.where), item.reason, item.kind)
    return Document(with_line(item.id), item.text)


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".parquet", ".arrow", ".stream.arrow", ".jsonl.gz", ".csv"])
@pytest.mark.parametrize("part_bytes", [1, 300, 1_000, 1 << 30])
def test_parts_cover_an_input_once(tmp_path: Path, suffix: str, part_bytes: int) -> None:
    texts = texts_of(50)
    inputs = list_inputs([WRITERS[suffix](tmp_path / f"a{suffix}", texts)])
    parts = cut(inputs, part_bytes)
    assert parts == cut(inputs, part_bytes)
    assert parts[0].start == 0 and parts[-1].stop is None
    assert all(a.stop == b.start for a, b in zip(parts, parts[1:], strict=False))
    assert sum(part.bytes for part in parts) == pytest.approx(inputs[0].bytes, abs=len(parts))
    assert (len(parts) > 1) == (part_bytes < 2_000 and suffix in (".jsonl", ".txt", ".parquet", ".arrow"))
    read = [item for part in parts for item in read_part(part, Reading(txt="line"))]
    assert [item.text for item in read if isinstance(item, Document)] == texts and len(read) == len(texts)


def test_a_file_that_grew_since_it_was_listed_is_read_to_its_end(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n' * 10)
    parts = cut(list_inputs([file]), 50)
    file.write_text('{"text": "a"}\n' * 15)
    assert sum(1 for part in parts for _ in read_part(part)) == 15


def test_strict_reading_takes_any_input(tmp_path: Path) -> None:
    make_tree(tmp_path / "f")
    assert len(list(read_documents([tmp_path / "f/sub", str(tmp_path / "f/*.csv")]))) == 3


def test_files_of_a_folder_that_nobody_reads_are_told(tmp_path: Path) -> None:
    for name in ("a.txt", "readme.md", "b.jsonl.gz", "deeper/picture.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert passed_over([tmp_path]) == [str(tmp_path / "deeper/picture.png"), str(tmp_path / "readme.md")]
    assert passed_over([tmp_path / "a.txt", "https://nowhere/x", f"{tmp_path}/*.txt"]) == []
