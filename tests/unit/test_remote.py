"""Shards behind a URL: the same tokens, few requests, a bounded cache, and a server's faults told with the URL."""

from __future__ import annotations

import multiprocessing
import os
import re
import socket
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.registry import _registry, known_implementations

from llama_dist.data.block_cache import BlockCache
from llama_dist.data.manifest import MANIFEST, Manifest
from llama_dist.data.packing import BestFit, index_folder, pack
from llama_dist.data.remote import BLOCK, RemoteStorage, default_cache, open_storage
from llama_dist.data.server import Server
from llama_dist.data.shard_writer import ShardWriter
from llama_dist.data.shards import Shards
from llama_dist.errors import RunError, UserError
from llama_dist.files import write_file

TOKENS = 400_000  # 800 kB, three blocks and a bit in each of two pairs
LENGTH = 129


def write_shards(folder: Path, *, tokens: int = TOKENS, seed: int = 0) -> Path:
    """A shard directory of random tokens in documents of 1,000."""
    folder.mkdir(parents=True)
    with ShardWriter(folder, vocab_size=1000, pair_tokens=tokens // 2) as writer:
        writer.add(np.random.default_rng(seed).integers(0, 1000, tokens), np.full(tokens // 1000, 1000))
        writer.finish()
    made_by = {"file": "x", "fingerprint": "y", "vocab_size": 1000, "bos_id": 1, "eos_id": 2}
    counts = {"tokens": tokens, "documents": tokens // 1000, "raw_bytes": tokens, "unigram_entropy": 6.0}
    manifest = Manifest(**counts, dtype="uint16", tokenizer=made_by, inputs=[], files=writer.files, command="test")
    write_file(folder / MANIFEST, manifest.to_json())
    return folder


class WebServer:
    """Serves a folder on the loopback interface, with the faults that a test asks for, and counts requests."""

    def __init__(self, folder: Path, *, ranges: bool = True) -> None:
        self.ranges, self.requests = ranges, Counter[str]()
        self.faults: list[str] = []  # one for each of the next GETs of a .bin file: "500", "cut", "hang", "flip"
        outer = self

        class Handler(SimpleHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def __init__(self, *args: Any) -> None:
                super().__init__(*args, directory=str(folder))

            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                outer.answer(self)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, request: SimpleHTTPRequestHandler) -> None:
        name = Path(request.path).name
        self.requests[name] += 1
        path = Path(request.translate_path(request.path))
        fault = self.faults.pop(0) if self.faults and name.endswith(".bin") else ""
        if not path.is_file() or fault == "500":
            request.send_error(500 if fault else 404)
            return
        content, status = path.read_bytes(), 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        if asked and self.ranges:
            content, status = content[int(asked[1]) : int(asked[2]) + 1], 206
        if fault == "hang":
            time.sleep(1.5)
        request.send_response(status)
        request.send_header("Content-Length", str(len(content) // 2 if fault == "short" else len(content)))
        request.end_headers()
        request.wfile.write(content[: len(content) // 2] if fault in ("cut", "short") else content)
        request.close_connection = bool(fault)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def local(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "local/shards")


@pytest.fixture
def web(local: Path) -> Iterator[WebServer]:
    server = WebServer(local.parent)
    yield server
    server.close()


def open_remote(url: str, cache: Path, *, limit: int = 1 << 30, timeout: float = 20.0) -> Shards:
    server = Server(url, waits=(0.01, 0.01), timeout=timeout)
    return Shards(url, storage=RemoteStorage(server, BlockCache(cache, limit)))


def assert_same(found: Shards, expected: Shards) -> None:
    starts = np.random.default_rng(1).integers(0, TOKENS - LENGTH, 200)
    assert (found.rows(starts, LENGTH) == expected.rows(starts, LENGTH)).all()
    assert (found.tokens(0, TOKENS) == expected.tokens(0, TOKENS)).all()
    assert found.document_at(TOKENS - 1) == expected.document_at(TOKENS - 1)
    assert found.document_span(7) == expected.document_span(7)
    assert (found.document_lengths() == expected.document_lengths()).all()


def test_memory_urls_are_read(local: Path, tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    files.put(f"{local}/", "/remote-test/", recursive=True)
    shards = Shards("memory://remote-test/", storage=open_storage("memory://remote-test/", cache=tmp_path / "cache"))
    assert_same(shards, Shards(local))
    assert shards.pair_of(TOKENS - 1) == "memory://remote-test/00001.bin"
    bare = open_remote("memory://remote-test/00001", tmp_path / "cache")
    assert bare.manifest is None and (bare.tokens(0, 9) == shards.tokens(TOKENS // 2, TOKENS // 2 + 9)).all()
    files.rm("/remote-test", recursive=True)
    assert_same(shards, Shards(local))  # all of it is in the cache
    with pytest.raises(UserError, match="memory://remote-test/?: has no MANIFEST.json"):
        open_remote("memory://remote-test", tmp_path / "cache")


@pytest.mark.parametrize("ranges", [True, False])
def test_web_servers_with_ranges_and_without(local: Path, tmp_path: Path, ranges: bool) -> None:
    server = WebServer(local.parent, ranges=ranges)
    shards = open_remote(f"{server.url}/shards", tmp_path / "cache")
    assert sum(server.requests.values()) == 1, "opening reads the manifest only"
    assert_same(shards, Shards(local))
    requests = server.requests["00000.bin"]
    assert requests <= (3 if ranges else 2)  # one to see whether there are ranges, then each block, or the file, once
    assert_same(open_remote(f"{server.url}/shards", tmp_path / "cache"), Shards(local))
    assert server.requests["00000.bin"] <= requests + 1, "the cache outlives its first user"
    server.close()


def test_a_file_too_large_for_the_cache_needs_ranges(local: Path, tmp_path: Path) -> None:
    server = WebServer(local.parent, ranges=False)
    shards = open_remote(f"{server.url}/shards", tmp_path / "cache", limit=300_000)
    with pytest.raises(UserError, match=r"00000.bin: the server gives only whole files, .* 400000 bytes do not fit"):
        shards.tokens(0, 1)
    server.close()


@pytest.mark.parametrize("bare", [False, True])
def test_best_fit_packed_samples_are_read(web: WebServer, local: Path, tmp_path: Path, bare: bool) -> None:
    url, path = f"{web.url}/shards", local
    if bare:
        (local / MANIFEST).unlink()
        url, path = f"{url}/00000", local / "00000"
    with pytest.raises(UserError, match=f"^{url}: has no index .*make it with `llama-dist pack` where .* copy it to {url}"):
        BestFit(open_remote(url, tmp_path / "cache"), 128)
    with pytest.raises(UserError, match=f"^{url}: an index is made where the shards are files; .*packed-128 to {url}"):
        pack(url, seq_len=128)
    pack(path, seq_len=128)
    expected, found = BestFit(Shards(path), 128), BestFit(open_remote(url, tmp_path / "cache"), 128)
    assert found.size == expected.size
    chosen = np.random.default_rng(1).integers(0, expected.size or 0, 50)
    there, here = found.rows(chosen), expected.rows(chosen)
    assert np.array_equal(there.tokens, here.tokens) and there.documents == here.documents
    assert [found.spans(i) for i in chosen[:5]] == [expected.spans(i) for i in chosen[:5]]
    (index_folder(path, 128) / "00000.pack").write_bytes(b"short")
    damaged = BestFit(open_remote(url, tmp_path / "other"), 128)
    with pytest.raises((UserError, RunError), match=f"^{url.removesuffix('/00000')}/.*packed-128/00000.pack: "):
        damaged.rows(np.array([0]))


def test_prefetch_fetches_in_the_background(web: WebServer, local: Path, tmp_path: Path) -> None:
    shards = open_remote(f"{web.url}/shards", tmp_path / "cache")
    starts = np.array([5, TOKENS - LENGTH])
    shards.prefetch(starts, LENGTH)
    shards.prefetch(np.array([TOKENS * 9, -5]), LENGTH)  # only a hint: never raises
    blocks = tmp_path / "cache/blocks"
    until = time.monotonic() + 20
    while len([p for p in blocks.rglob("*") if p.is_file() and p.name.isdigit()]) < 2:
        assert time.monotonic() < until, "nothing came"
        time.sleep(0.01)
    requests = web.requests.total()
    assert (shards.rows(starts, LENGTH) == Shards(local).rows(starts, LENGTH)).all()
    assert web.requests.total() == requests


@pytest.mark.parametrize("fault", ["500", "cut", "short", "hang"])
def test_a_fault_that_passes_is_tried_again(web: WebServer, local: Path, tmp_path: Path, fault: str) -> None:
    shards = open_remote(f"{web.url}/shards", tmp_path / "cache", timeout=0.7)
    shards.tokens(TOKENS - 1, TOKENS)
    web.faults = [fault, fault]
    assert (shards.tokens(0, 9) == Shards(local).tokens(0, 9)).all()
    assert web.faults == []


@pytest.mark.parametrize(("fault", "said"), [("500", "500"), ("cut", ""), ("short", "bytes came"), ("hang", "Timeout")])
def test_a_fault_that_stays_is_told(web: WebServer, tmp_path: Path, fault: str, said: str) -> None:
    shards = open_remote(f"{web.url}/shards", tmp_path / "cache", timeout=0.7)
    shards.tokens(TOKENS - 1, TOKENS)
    web.faults = [fault] * 50
    with pytest.raises(RunError, match=rf"{web.url}/shards/00000.bin: cannot be read, in 3 tries .*{said}"):
        shards.tokens(0, 9)


def test_what_is_not_there_is_named_with_its_url(web: WebServer, local: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{web.url}/absent: has no MANIFEST.json"):
        open_remote(f"{web.url}/absent", tmp_path / "cache")
    (local / "00000.bin").unlink()
    shards = open_remote(f"{web.url}/shards", tmp_path / "cache")
    with pytest.raises(UserError, match=f"{web.url}/shards/00000.bin: is missing"):
        shards.tokens(0, 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(RunError, match=f"http://127.0.0.1:{port}/x/{MANIFEST}: cannot be read, in 3 tries"):
        open_remote(f"http://127.0.0.1:{port}/x", tmp_path / "cache")


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(_registry, "s3", raising=False)  # where another test has used it
    monkeypatch.setitem(known_implementations, "s3", {"class": "absent.S3", "err": "Install s3fs"})
    with pytest.raises(UserError, match="s3://bucket/x: cannot be read: Install s3fs"):
        open_storage("s3://bucket/x", cache=tmp_path)
    with pytest.raises(UserError, match="nonsense://x: cannot be read: .*nonsense"):
        open_storage("nonsense://x", cache=tmp_path)


def test_a_damaged_block_of_the_cache_is_fetched_again(web: WebServer, local: Path, tmp_path: Path) -> None:
    cache, expected = tmp_path / "cache", Shards(local)
    assert_same(open_remote(f"{web.url}/shards", cache), expected)
    blocks = sorted(p for p in (cache / "blocks").rglob("*") if p.is_file())
    assert len(blocks) == 5, "two of each .bin; the two .idx are the same"
    rng = np.random.default_rng(0)
    for i, path in enumerate(blocks):
        content = bytearray(path.read_bytes())
        if i % 4 == 0:
            content[rng.integers(len(content))] ^= 1
        path.write_bytes([content, content[: len(content) // 2], b"", blocks[i - 1].read_bytes()][i % 4])
    assert_same(open_remote(f"{web.url}/shards", cache), expected)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_cache_is_bounded_and_forgets_what_was_used_longest_ago(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, limit=10 * 1008)
    for number in range(30):
        cache.put("key", number, bytes([number]) * 1000)
        os.utime(tmp_path / "blocks/ke/key" / str(number), (number + 1, number + 1))
        assert cache.get("key", 0) is not None, "it was used all the time"
        assert size_of(tmp_path / "blocks") <= 10 * 1008
    assert cache.get("key", 29) == bytes([29]) * 1000 and cache.get("key", 15) is None
    again = BlockCache(tmp_path, limit=3 * 1008)  # another process, of less room: it counts what is there
    again.put("other", 0, b"x" * 1000)
    assert size_of(tmp_path / "blocks") <= 3 * 1008 and again.get("other", 0) == b"x" * 1000


def test_a_cache_smaller_than_the_corpus_gives_the_same_tokens(web: WebServer, local: Path, tmp_path: Path) -> None:
    shards = open_remote(f"{web.url}/shards", tmp_path / "cache", limit=3 * BLOCK)
    assert_same(shards, Shards(local))
    assert 0 < size_of(tmp_path / "cache") <= 3 * BLOCK


@pytest.mark.filterwarnings("ignore:.*remote blocks cannot be kept")  # of the threads that fetch ahead
def test_a_cache_that_cannot_be_written_is_told(web: WebServer, local: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/cache: cannot be made .* set data.cache to a folder"):
        BlockCache(tmp_path / "file/cache", 1)
    shards = open_remote(f"{web.url}/shards", tmp_path / "cache")
    (tmp_path / "cache/blocks").rmdir()
    (tmp_path / "cache/blocks").write_text("in the way")
    with pytest.warns(UserWarning, match="remote blocks cannot be kept there"):
        assert_same(shards, Shards(local))


def test_the_cache_lies_where_caches_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "llama_dist"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache/llama_dist"


def read_in_a_process(url: str, cache: str, seed: int, results: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shards = open_remote(url, Path(cache))
        starts = np.random.default_rng(seed).integers(0, TOKENS - LENGTH, 100)
        results.put((starts, shards.rows(starts, LENGTH)))


def test_processes_share_the_cache(web: WebServer, local: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = [(f"{web.url}/shards", str(tmp_path / "cache"), seed, results) for seed in (1, 2, 3)]
    processes = [context.Process(target=read_in_a_process, args=a) for a in arguments]
    for process in processes:
        process.start()
    expected = Shards(local)
    for _ in processes:
        starts, rows = results.get(timeout=120)
        assert (rows == expected.rows(starts, LENGTH)).all()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    # Each block once, and each process looks once whether there are ranges.
    assert web.requests["00000.bin"] + web.requests["00001.bin"] <= 2 * 2 + 3
