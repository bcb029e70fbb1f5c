"""Units of work: a stretch of the inputs -> a folder of token shards, whole or not at all.

While shards are made, their folder is OUT.partial, and unit 3 of the work is the folder 00003 in it: its .bin/.idx
pairs, `record.json`, `counts.npz` and, where something could not be read, `skipped.jsonl`. It is written under a name
of its process and renamed when all of it is on the disk, so a unit that is there is finished, whoever was killed.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llama_dist.data.claims import Claims
from llama_dist.data.documents import Document, Reading, Skipped, read_part
from llama_dist.data.inputs import DATASETS, Input, Part, cut
from llama_dist.data.manifest import MANIFEST
from llama_dist.data.opening import is_url
from llama_dist.data.shard_writer import PAIR_TOKENS, ShardWriter
from llama_dist.data.tokenizer import Tokenizer
from llama_dist.errors import UserError
from llama_dist.files import HashingFile, sync_folder

MIN_UNIT_BYTES = 4 << 20
MAX_UNITS = 1024
BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 1 << 14
SKIPPED_LINES = 100  # of a unit, that are listed one by one
FIRST_SKIPPED = 3  # of a unit, that its record tells
MERGED = MANIFEST  # there when all units have been put together, before they are removed
EMPTY = "empty"  # the kind of a document without text, which is no fault
RECORD, COUNTS, SKIPPED = "record.json", "counts.npz", "skipped.jsonl"


@dataclass(frozen=True)
class Unit:
    """Consecutive parts of the inputs, `bytes` of them as they are stored."""

    number: int
    parts: tuple[Part, ...]
    bytes: int

    @property
    def name(self) -> str:
        return f"{self.number:05d}"


@dataclass(frozen=True)
class Job:
    """What is the same for all units."""

    folder: Path
    tokenizer: str
    fingerprint: str
    reading: Reading
    pair_tokens: int = PAIR_TOKENS


@dataclass
class Record:
    """What came of a unit.

    `skipped` are counts by kind; `first` are the first items that were skipped, as [where, why].
    """

    documents: int = 0
    tokens: int = 0
    raw_bytes: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    first: list[list[str]] = field(default_factory=list)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


def unit_size(inputs: Sequence[Input]) -> int:
    """How many bytes of input a unit should have: 4 MiB, or a 1024th of everything where that is more."""
    return max(MIN_UNIT_BYTES, sum(item.bytes for item in inputs) // MAX_UNITS)


def units_of(inputs: Sequence[Input], unit_bytes: int) -> list[Unit]:
    """The inputs in units of about `unit_bytes`, a function of the arguments alone.

    What cannot be cut, such as a compressed file, is in one unit whatever its size.
    """
    units: list[Unit] = []
    parts: list[Part] = []
    size = 0
    for part in cut(inputs, unit_bytes):
        is_local = not (is_url(part.path) or part.path.startswith(DATASETS))
        more = part.bytes if part.bytes or is_local else unit_bytes  # of unknown size: a unit of its own
        if parts and size + more // 2 >= unit_bytes:  # with this part it would be further from the size than without
            units.append(Unit(len(units), tuple(parts), size))
            parts, size = [], 0
        parts.append(part)
        size += more
    if parts:
        units.append(Unit(len(units), tuple(parts), size))
    return units


def finished(folder: Path) -> set[int]:
    """The numbers of the units that are done and have not been put together."""
    return {int(name) for name in os.listdir(folder) if name.isdigit()}


def load_record(folder: Path, number: int) -> Record | None:
    """None: all units were put together, and theirs go. Raises UserError where it was changed from outside."""
    file = folder / f"{number:05d}" / RECORD
    try:
        return Record(**json.loads(file.read_bytes()))
    except (ValueError, TypeError, OSError) as error:
        if (folder / MERGED).exists() or not folder.exists():
            return None
        raise UserError(f"{file}: is damaged ({error}); remove {file.parent} and prepare again") from error


def do_unit(unit: Unit, job: Job, tokenizer: Tokenizer, claims: Claims, tell: Callable[[int], None]) -> bool:
    """Make a unit, unless another process is at it (False). `tell` hears of each some bytes of text that were done."""
    if not claims.take(unit.number):
        return False
    try:
        done = job.folder / unit.name
        if done.is_dir() or (job.folder / MERGED).exists():
            return True
        work = _work_folder(unit, job.folder, claims)
        try:
            _encode(unit, job, tokenizer, work, tell)
            sync_folder(work)
            os.rename(work, done)
            sync_folder(job.folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise  # without locks, another process may have made the same
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return True
    finally:
        claims.release(unit.number)


def _work_folder(unit: Unit, folder: Path, claims: Claims) -> Path:
    prefix = f"{unit.name}.work-{socket.gethostname()}-"
    if claims.shared:
        for left in folder.glob(f"{prefix}*"):  # by a killed process, since this one holds the claim
            shutil.rmtree(left, ignore_errors=True)
    work = folder / f"{prefix}{os.getpid()}-{secrets.token_hex(4)}"
    work.mkdir()
    return work


def discard_work(folder: Path, process: int) -> None:
    """Remove what a process of this machine, which has ended, had begun."""
    for left in folder.glob(f"*.work-{socket.gethostname()}-{process}-*"):
        shutil.rmtree(left, ignore_errors=True)


def _encode(unit: Unit, job: Job, tokenizer: Tokenizer, folder: Path, tell: Callable[[int], None]) -> None:
    record = Record()
    skips = _Skips(folder)
    with skips, ShardWriter(folder, vocab_size=tokenizer.vocab_size, pair_tokens=job.pair_tokens) as writer:
        for texts, ids, size in _batches(unit, job.reading, skips):
            writer.add(*tokenizer.encode_batch(texts, bos_eos=True), ids)
            record.raw_bytes += size
            tell(size)
        writer.finish()
        skips.finish()
    record.documents, record.tokens, record.files = writer.num_documents, writer.num_tokens, writer.files
    record.skipped, record.first = dict(sorted(skips.kinds.items())), skips.first
    with open(folder / COUNTS, "xb") as counts:
        np.savez_compressed(counts, counts=writer.counts)
        counts.flush()
        os.fsync(counts.fileno())
    with HashingFile(folder / RECORD) as file:
        file.write(json.dumps(asdict(record)).encode())


def _batches(
    unit: Unit, reading: Reading, skips: _Skips
) -> Iterator[tuple[list[str], list[tuple[str, str]], int]]:
    """The texts of a unit, some at a time, with the input and id of each, and their size in bytes of UTF-8."""
    texts: list[str] = []
    ids: list[tuple[str, str]] = []
    length = size = 0
    for part in unit.parts:
        for item in read_part(part, reading):
            if isinstance(item, Skipped):
                skips.add(item)
                continue
            text = item.text
            texts.append(text)
            ids.append((part.path, item.id))
            length += len(text)
            size += len(text) if text.isascii() else len(text.encode())
            if length >= BATCH_CHARACTERS or len(texts) >= BATCH_DOCUMENTS:
                yield texts, ids, size
                texts, ids, length, size = [], [], 0, 0
    if texts:
        yield texts, ids, size


class _Skips:
    """The items of a unit that were skipped: counted by kind, and the first that are not just empty in a file."""

    def __init__(self, folder: Path) -> None:
        self.kinds: Counter[str] = Counter()
        self.first: list[list[str]] = []
        self._items = 0
        self._path = folder / SKIPPED
        self._file: HashingFile | None = None

    def __enter__(self) -> _Skips:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self._file is not None:
            self._file.__exit__(kind, error, trace)

    def add(self, item: Skipped) -> None:
        self.kinds[item.kind] += item.count
        if item.kind == EMPTY:
            return
        self._items += 1
        if self._items <= FIRST_SKIPPED:
            self.first.append([item.where, item.reason])
        if self._items <= SKIPPED_LINES:
            self._write({"where": item.where, "kind": item.kind, "reason": item.reason})

    def finish(self) -> None:
        if self._items > SKIPPED_LINES:
            self._write({"more": self._items - SKIPPED_LINES})

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is None:
            self._file = HashingFile(self._path)
        self._file.write((json.dumps(line, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))
