"""This project's part in benchmarks/data.py, in processes of its own as each peer's is, and the files for all of them.

    python -c 'import data_ours; data_ours.main()' NAME '{"its": "arguments"}'

Not as a script: worker processes import the script that started them, and this one imports torch, which `llama-dist
prepare` does not.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.ma  # noqa: F401  # numpy itself does so at the first np.unique; imports are not measured
from data_peers import Answer, answer, fresh, measure_loader, peak_memory, stopwatch, watch_memory
from tokenizing import documents_of

from llama_dist.config_data import DataConfig, Source
from llama_dist.data.loader import Batch, Loader
from llama_dist.data.manifest import MANIFEST, Manifest
from llama_dist.data.megatron import HEADER, MAGIC
from llama_dist.data.prefetch import Prefetching
from llama_dist.data.prepare import prepare
from llama_dist.data.shard_writer import ShardWriter
from llama_dist.data.tokenizer import load_tokenizer

GLOBAL_BATCH, MICRO_BATCH = 64, 8
AHEAD = 2  # steps, the default of data.prefetch
BLOCK = 1 << 20
PAIR_TOKENS = 1 << 30  # of the sparse shards
DOCUMENT_TOKENS = 1 << 20


def make_text(*, corpora: str, mb: float, more: int, out: str) -> Answer:
    """The corpora in documents of 1 to 3 thousand characters, in two jsonl files: once, and repeated to `mb`.

    And to `more` times that, for what more workers gain when they have enough to do.
    """
    documents = documents_of(Path(corpora))
    sizes = [len(text.encode()) for text in documents]
    found: Answer = {}
    totals = {"once": sum(sizes), "repeated": int(mb * 1e6), "more": int(more * mb * 1e6)}
    for name, total in totals.items():
        folder, size = fresh(f"{out}/{name}"), 0
        halves = [open(f"{folder}/{half}.jsonl", "w", encoding="utf-8") for half in range(2)]
        for text, bytes_ in cycle(zip(documents, sizes, strict=True)):
            halves[size >= total / 2].write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            size += bytes_
            if size >= total:
                break
        for half in halves:
            half.close()
        found[name] = {"files": [half.name for half in halves], "bytes": size}
    return found


def tokenise(*, inputs: list[str], tokenizer: str, workers: int, out: str) -> Answer:
    fresh(out)
    watch = stopwatch()
    manifest = prepare(inputs, tokenizer, f"{out}/shards", workers=workers).manifest
    return watch() | {"tokens": manifest.tokens}


def make_shards(*, tokens: int, tokenizer: str, out: str) -> None:
    """One pair of random ids in documents of 200 to 1,800 tokens: what they are is nothing to a loader."""
    rng = np.random.default_rng(0)
    folder = Path(fresh(out))
    vocab_size = load_tokenizer(tokenizer).vocab_size
    with ShardWriter(folder, vocab_size=vocab_size) as writer:
        while writer.num_tokens < tokens:
            lengths = rng.integers(200, 1800, min(BLOCK, tokens) // 1000)
            ids = rng.integers(3, vocab_size, lengths.sum(), dtype=np.int32)
            ends = np.cumsum(lengths)
            ids[ends - lengths], ids[ends - 1] = 1, 2
            writer.add(ids, lengths)
        writer.finish()
    _write_manifest(folder, tokenizer, writer.files, writer.num_tokens, writer.num_documents)


def make_sparse_shards(*, tokens: int, tokenizer: str, out: str) -> None:
    """So many zeros, in files of 2 GiB that take no room on the disk."""
    folder = Path(fresh(out))
    count = PAIR_TOKENS // DOCUMENT_TOKENS
    lengths = np.full(count, DOCUMENT_TOKENS, "<i4")
    starts = np.arange(count, dtype="<i8") * DOCUMENT_TOKENS * 2
    index = HEADER.pack(MAGIC, 1, 8, count, count + 1)
    index += lengths.tobytes() + starts.tobytes() + np.arange(count + 1, dtype="<i8").tobytes()
    files: dict[str, dict[str, Any]] = {}
    for i in range(math.ceil(tokens / PAIR_TOKENS)):
        with open(folder / f"{i:05d}.bin", "wb") as file:
            os.truncate(file.fileno(), PAIR_TOKENS * 2)
        (folder / f"{i:05d}.idx").write_bytes(index)
        holds = {"tokens": PAIR_TOKENS, "documents": count}
        files[f"{i:05d}.bin"] = {"bytes": PAIR_TOKENS * 2, "xxh3_128": f"{2 * i:032x}", **holds}
        files[f"{i:05d}.idx"] = {"bytes": len(index), "xxh3_128": f"{2 * i + 1:032x}"}
    _write_manifest(folder, tokenizer, files, len(files) // 2 * PAIR_TOKENS, len(files) // 2 * count)


def _write_manifest(folder: Path, tokenizer: str, files: dict[str, Any], tokens: int, documents: int) -> None:
    known = load_tokenizer(tokenizer)
    made_by = {
        "file": tokenizer, "fingerprint": known.fingerprint, "vocab_size": known.vocab_size, "bos_id": known.bos_id,
        "eos_id": known.eos_id,
    }  # fmt: skip
    manifest = Manifest(
        tokens=tokens, documents=documents, raw_bytes=0, unigram_entropy=1.0, dtype="uint16", tokenizer=made_by,
        inputs=[], files=files, command="benchmarks/data.py",
    )  # fmt: skip
    (folder / MANIFEST).write_bytes(manifest.to_json())


def load(*, pair: str, length: int, seconds: float, tokenizer: str, prefetch: int) -> Answer:
    """As training does: a step's micro-batches at a time, and a `seek` at the end, to another epoch, in seconds."""
    data = _config(str(Path(pair).parent), length, tokenizer)

    def run() -> Iterator[int]:
        nonlocal loader
        loader = _open(data)
        with Prefetching(loader, steps=prefetch, until=1 << 60) as ahead:
            yield from _steps(ahead.microbatches, length)

    loader: Loader | None = None
    found = measure_loader(run, seconds)
    assert loader is not None, "nothing was loaded"
    began = time.perf_counter()
    loader.microbatches(1_000_003 * GLOBAL_BATCH)
    return found | {"seek": time.perf_counter() - began}


def seek(*, shards: str, length: int, tokenizer: str) -> Answer:
    """Open shards and read a step in the middle of them; then jump to another. Seconds, and bytes of memory."""
    data = _config(shards, length, tokenizer)
    before = watch_memory()
    began = time.perf_counter()
    loader = _open(data)
    opened = time.perf_counter() - began
    middle = (loader.num_samples[0] or 0) // 2 // GLOBAL_BATCH * GLOBAL_BATCH
    began = time.perf_counter()
    loader.microbatches(middle)
    first = time.perf_counter() - began
    began = time.perf_counter()
    loader.microbatches(middle // 2)
    again = time.perf_counter() - began
    return {"open": opened, "seek": first, "again": again, "memory": peak_memory() - before}


def _config(shards: str, length: int, tokenizer: str) -> DataConfig:
    return DataConfig(tokenizer=tokenizer, train=[Source(shards=shards)], seq_len=length)


def _open(data: DataConfig) -> Loader:
    loader = Loader(data, vocab_size=1 << 16, global_batch=GLOBAL_BATCH, micro_batch=MICRO_BATCH, dp=1, dp_rank=0)
    loader.begin(steps=1_000_000)
    return loader


def _steps(microbatches: Callable[[int], list[Batch]], length: int) -> Iterator[int]:
    consumed = 0
    while True:
        yield sum(len(batch.tokens) for batch in microbatches(consumed)) * length
        consumed += GLOBAL_BATCH


def main() -> None:
    answer({
        "make_text": make_text, "tokenise": tokenise, "make_shards": make_shards,
        "make_sparse_shards": make_sparse_shards, "load": load, "seek": seek,
    })  # fmt: skip
