"""Raw text -> a shard directory, in parallel; the result does not depend on the number of workers."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import signal
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_dist.data.documents import Document, list_files, read_documents
from llama_dist.data.files import checksum_of, is_free, new_folder
from llama_dist.data.shard_writer import PAIR_TOKENS, ShardWriter
from llama_dist.data.shards import MANIFEST, Manifest, Shards, load_manifest
from llama_dist.data.tokenizer import Tokenizer, load_tokenizer
from llama_dist.errors import UserError
from llama_dist.files import write_file

BATCH_CHARACTERS = 1 << 20


class Prepared(NamedTuple):
    """What `prepare` has to tell: the manifest of the shards, and whether they were there already."""

    manifest: Manifest
    already_there: bool


class Encoded(NamedTuple):
    """A batch of documents as tokens."""

    tokens: np.ndarray
    lengths: np.ndarray
    raw_bytes: int


def prepare(
    inputs: Sequence[str | Path],
    tokenizer_path: str | Path,
    out: str | Path,
    *,
    workers: int | None = None,
    pair_tokens: int = PAIR_TOKENS,
) -> Prepared:
    """Tokenize .txt and .jsonl files into the shard directory `out`; each document is bos, its ids, eos.

    `workers` processes do it (default: one a core); a few batches of text each are all that is in memory. `out`
    appears when it is complete; where it holds the shards of the same inputs and tokenizer already, nothing is done.
    Raises UserError for a bad input or tokenizer, and where `out` holds anything else.
    """
    out = Path(out)
    workers = workers if workers is not None else os.cpu_count() or 1
    if workers < 1:
        raise UserError(f"workers={workers}: at least 1 process is needed; leave it out for one a core")
    tokenizer = load_tokenizer(tokenizer_path)
    files = list_files(inputs)
    command = ["llama-dist", "prepare", *map(str, inputs), "--tokenizer", str(tokenizer_path), "--out", str(out)]
    wanted = _manifest_of_inputs(files, tokenizer, path=tokenizer_path, command=shlex.join(command))
    if not is_free(out):
        return Prepared(_finished(out, wanted), already_there=True)

    batches = _batches(read_documents(files))
    # A process takes a second to start, so a small input is not worth more than a few.
    useful = sum(item["bytes"] for item in wanted.inputs) // BATCH_CHARACTERS + 1
    encoding = closing(_encode_all(batches, tokenizer, path=str(tokenizer_path), workers=min(workers, useful)))
    with (
        new_folder(out) as folder,
        ShardWriter(folder, vocab_size=tokenizer.vocab_size, pair_tokens=pair_tokens) as writer,
        encoding as stream,
    ):
        raw_bytes = 0
        for encoded in stream:
            writer.add(encoded.tokens, encoded.lengths)
            raw_bytes += encoded.raw_bytes
        writer.finish()
        manifest = replace(
            wanted,
            tokens=writer.num_tokens,
            documents=writer.num_documents,
            raw_bytes=raw_bytes,
            unigram_entropy=writer.unigram_entropy,
            dtype=writer.dtype.name,
            files=writer.files,
        )
        write_file(folder / MANIFEST, manifest.to_json())
    return Prepared(manifest, already_there=False)


def _manifest_of_inputs(files: list[Path], tokenizer: Tokenizer, *, path: str | Path, command: str) -> Manifest:
    """A manifest with all that is known before the work."""
    return Manifest(
        tokens=0,
        documents=0,
        raw_bytes=0,
        unigram_entropy=0.0,
        dtype="",
        tokenizer={
            "file": str(path),
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
        },
        inputs=[{"file": str(f), "bytes": f.stat().st_size, "xxh3_128": checksum_of(f)} for f in files],
        files={},
        command=command,
    )


def _finished(out: Path, wanted: Manifest) -> Manifest:
    """The manifest in `out`, where it is that of the same inputs and tokenizer."""
    advice = "remove it first, or choose another --out"
    if not (out / MANIFEST).is_file():
        raise UserError(f"{out}: is there and is not a shard directory; {advice}")
    found = load_manifest(out)
    if found.tokenizer["fingerprint"] != wanted.tokenizer["fingerprint"]:
        raise UserError(f"{out}: holds shards of another tokenizer ({found.tokenizer['file']}); {advice}")
    if _contents(found.inputs) != _contents(wanted.inputs):
        raise UserError(f"{out}: holds shards of other inputs (made by `{found.command}`); {advice}")
    Shards(out).check_sizes()
    return found


def _contents(inputs: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return [(item["bytes"], item["xxh3_128"]) for item in inputs]


def _batches(documents: Iterable[Document]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document.text)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_all(
    batches: Iterator[list[str]], tokenizer: Tokenizer, *, path: str, workers: int
) -> Generator[Encoded, None, None]:
    """The batches as tokens, in order."""
    if workers == 1:
        yield from (_encode(tokenizer, batch) for batch in batches)
        return
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    try:
        encoding = (pool.submit(_encode_in_worker, path, batch) for batch in batches)
        yield from _in_order(encoding, ahead=2 * workers)
    except BrokenProcessPool as error:
        raise UserError(
            "prepare: a worker process died, most likely because memory ran out; use fewer --workers, or smaller files"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(encoding: Iterator[Future[Encoded]], *, ahead: int) -> Iterator[Encoded]:
    """Results in the order of the batches, with at most `ahead` of them in the works: this bounds the memory."""
    waiting: deque[Future[Encoded]] = deque()
    for future in encoding:
        waiting.append(future)
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _encode(tokenizer: Tokenizer, texts: list[str]) -> Encoded:
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    documents = [np.array([*bos, *tokenizer.encode(text), tokenizer.eos_id], dtype=np.int32) for text in texts]
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    return Encoded(np.concatenate(documents), lengths, sum(len(text.encode()) for text in texts))


def _start_worker() -> None:
    """Ctrl-C reaches the whole process group; the parent alone answers it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _encode_in_worker(path: str, texts: list[str]) -> Encoded:
    return _encode(_tokenizer_of_worker(path), texts)


@cache
def _tokenizer_of_worker(path: str) -> Tokenizer:
    """Loaded with the first batch of a worker and kept for the others."""
    return load_tokenizer(path)
