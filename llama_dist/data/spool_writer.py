"""Text -> a growing shard directory: the writing side of a spool.

Pairs of shards are written one after another, the first ones short, so that training need not wait long. A new
MANIFEST.json, put in place of the old one at once, is what adds a pair; it also names the file that says how far the
text was read, so that a process that goes on after a kill begins where the finished pairs end.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import xxhash

from llama_dist.data.claims import Claims
from llama_dist.data.documents import Skipped, read_part, with_line
from llama_dist.data.files import checksum_of
from llama_dist.data.inputs import cut, list_inputs
from llama_dist.data.manifest import MANIFEST, FileEntry, Manifest
from llama_dist.data.origins import SUFFIX
from llama_dist.data.plan import contents, identify
from llama_dist.data.rows import Reading
from llama_dist.data.shard_writer import ShardWriter, unigram_entropy
from llama_dist.data.shards import load_manifest
from llama_dist.data.skips import TOLD, SkipLimit, too_many
from llama_dist.data.stream import END, ERROR, WANTED
from llama_dist.data.tokenizer import load_tokenizer
from llama_dist.data.units import BATCH_DOCUMENTS, EMPTY
from llama_dist.data.words import counted
from llama_dist.errors import UserError
from llama_dist.files import write_file

log = logging.getLogger(__name__)

AHEAD = 1 << 24  # tokens that are made before anyone wants them
FIRST_PAIR, LARGEST_PAIR = 1 << 18, 1 << 24  # tokens; a pair is an eighth of what there is already
PART_BYTES = 32 << 20  # of plain text, of which one part is read again after a kill
BATCH_CHARACTERS = 1 << 18
FEW_DOCUMENTS = 10_000  # before so many a share of them means nothing
LOCK, WORK, READ, COUNTS = "LOCK", "work", "READ", "COUNTS"
PAUSE_SECONDS = 0.1


@dataclass(frozen=True)
class SpoolJob:
    """What one process is to do: `inputs` as `list_inputs` takes them."""

    folder: Path
    inputs: str
    reading: Reading
    tokenizer: str
    fingerprint: str
    max_skipped: str
    log: Path


@dataclass
class Read:
    """How far the text was read: `items` documents (or what was skipped) of part `part`; `inputs` is a hash of them."""

    inputs: str
    part: int = 0
    items: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    first: list[str] = field(default_factory=list)


def write_spool(job: SpoolJob, *, pause: Callable[[], None] = lambda: time.sleep(PAUSE_SECONDS)) -> None:
    """Fill a spool to the end of the text, never much farther than is wanted; calls `pause` while that is enough.

    Raises UserError for inputs that cannot be read, or of which too much had to be skipped.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    with Claims(job.folder / LOCK) as claims:
        while not claims.take_folder():  # of an earlier start, that is about to end
            time.sleep(PAUSE_SECONDS)
        spool = _Spool(job)
        while not spool.ended:
            if spool.num_tokens >= _wanted(job.folder) + AHEAD:
                pause()
            else:
                spool.add_pair()


class _Spool:
    """The writing side of a spool."""

    def __init__(self, job: SpoolJob) -> None:
        self._job = job
        self._tokenizer = load_tokenizer(job.tokenizer)
        if self._tokenizer.fingerprint != job.fingerprint:
            raise UserError(f"{job.tokenizer}: changed while it was used; put the right one there and go on")
        self._limit = SkipLimit(job.max_skipped)
        self._manifest: Manifest | None = None
        if (job.folder / MANIFEST).is_file():
            self._manifest = load_manifest(job.folder)
        self.ended = self._manifest is not None and END in self._manifest.files
        if self.ended:
            log.info("all of the text is here: %d tokens of %d documents", *self._told())
            return
        inputs = list_inputs([job.inputs])
        self._parts = cut(inputs, PART_BYTES)
        made_of = xxhash.xxh3_128(json.dumps(contents(identify(inputs))).encode()).hexdigest()
        self._read, self._counts = self._begin(made_of)
        self._skipped = Counter(self._read.skipped)
        self._seen = self._told()[1] + self._faults
        self._batches = self._read_on()

    @property
    def num_tokens(self) -> int:
        return self._manifest.tokens if self._manifest else 0

    @property
    def _num_pairs(self) -> int:
        return sum(name.endswith(".bin") for name in self._manifest.files) if self._manifest else 0

    def add_pair(self) -> None:
        """Read on for one more pair of shards, or to the end of the text."""
        goal = min(max(self.num_tokens // 8, FIRST_PAIR), LARGEST_PAIR)
        work = self._job.folder / WORK
        work.mkdir()
        size = 0
        with ShardWriter(work, vocab_size=self._tokenizer.vocab_size, pair_tokens=1 << 62) as writer:
            while writer.num_tokens < goal:
                batch = next(self._batches, None)
                if batch is None:
                    self._judge(self._seen)
                    self.ended = True
                    break
                texts, ids, batch_size = batch
                writer.add(*self._tokenizer.encode_batch(texts, bos_eos=True), ids)
                size += batch_size
            writer.finish()
        self._commit(writer, size)
        log.info("%d tokens of %d documents%s", *self._told(), "; that was all" if self.ended else "")

    def _begin(self, made_of: str) -> tuple[Read, np.ndarray]:
        """How far the text was read, and the counts of all tokens so far; what a killed process left is removed."""
        folder, files = self._job.folder, {} if self._manifest is None else self._manifest.files
        for left in folder.iterdir():
            if left.name == WORK:
                shutil.rmtree(left)
            elif left.name not in (*files, MANIFEST, LOCK, WANTED, ERROR):
                left.unlink()
        if self._manifest is None:
            return Read(made_of), np.zeros(self._tokenizer.vocab_size, dtype=np.int64)
        try:
            read = Read(**json.loads((folder / _name(READ, self._num_pairs)).read_bytes()))
            counts = np.array(json.loads((folder / _name(COUNTS, self._num_pairs)).read_bytes()), dtype=np.int64)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{folder}: is damaged ({error}); remove it, and the text is read again") from error
        if read.inputs != made_of:
            raise UserError(
                f"{self._job.inputs}: is not what it was when the stream was begun: other files, or other text; give "
                f"back what it was, or remove {folder} to read what is there now from its beginning"
            )
        log.info("goes on after %d tokens of %d documents", *self._told())
        return read, counts

    def _told(self) -> tuple[int, int]:
        return (self._manifest.tokens, self._manifest.documents) if self._manifest else (0, 0)

    def _read_on(self) -> Iterator[tuple[list[str], list[tuple[str, str]], int]]:
        """Texts, some at a time, their ids and their size in UTF-8; `self._read` is then how far they go."""
        texts: list[str] = []
        ids: list[tuple[str, str]] = []
        length = size = 0
        for part in self._parts[self._read.part :]:
            for item in islice(read_part(part, self._job.reading), self._read.items, None):
                self._read.items += 1
                if isinstance(item, Skipped):
                    self._skip(item)
                    continue
                self._seen += 1
                texts.append(item.text)
                ids.append((part.path, item.id))
                length += len(item.text)
                size += len(item.text) if item.text.isascii() else len(item.text.encode())
                if length >= BATCH_CHARACTERS or len(texts) >= BATCH_DOCUMENTS:
                    yield texts, ids, size
                    texts, ids, length, size = [], [], 0, 0
            self._read.part, self._read.items = self._read.part + 1, 0
        if texts:
            yield texts, ids, size

    @property
    def _faults(self) -> int:
        """How many documents were skipped for something that is wrong with them."""
        return self._skipped.total() - self._skipped[EMPTY]

    def _skip(self, item: Skipped) -> None:
        self._skipped[item.kind] += item.count
        if item.kind == EMPTY:
            return
        self._seen += item.count
        if len(self._read.first) < TOLD:
            self._read.first.append(f"{with_line(item.where)}: {item.reason}")
        log.warning("skipped: %s", item)
        self._judge(max(self._seen, FEW_DOCUMENTS))

    def _judge(self, documents: int) -> None:
        if not self._limit.allows(self._faults, documents):
            seen = f"{counted(self._seen, 'document')} of the stream so far"
            first = [each.partition(": ")[::2] for each in self._read.first]
            problem = too_many(first, self._faults, seen, self._skipped, self._limit.text)
            raise UserError(f"{problem}; mend them, or raise stream.max_skipped")

    def _commit(self, writer: ShardWriter, size: int) -> None:
        """Add what was written to the spool, with how far the text was read."""
        job, before, pair = self._job, self._manifest, self._num_pairs
        files: dict[str, FileEntry] = {}
        if before is not None:
            files = {name: file for name, file in before.files.items() if name.endswith((".bin", ".idx", SUFFIX))}
        for name, entry in writer.files.items():
            pair_name = f"{pair:05d}{Path(name).suffix}"
            os.replace(job.folder / WORK / name, job.folder / pair_name)
            files[pair_name] = entry  # type: ignore[assignment]
        shutil.rmtree(job.folder / WORK)
        self._counts += writer.counts
        documents, tokens = writer.num_documents, writer.num_tokens
        if before is not None:
            documents, tokens, size = documents + before.documents, tokens + before.tokens, size + before.raw_bytes
        if not documents:
            raise UserError(f"{job.inputs}: no documents with text; give text that has some")
        self._read.skipped = dict(sorted(self._skipped.items()))
        for name in self._write_progress(pair + bool(writer.files)):
            path = job.folder / name
            files[name] = {"bytes": path.stat().st_size, "xxh3_128": checksum_of(path)}
        self._manifest = Manifest(
            tokens=tokens,
            documents=documents,
            raw_bytes=size,
            unigram_entropy=unigram_entropy(self._counts),
            dtype=str(writer.dtype),  # type: ignore[arg-type]
            tokenizer={
                "file": job.tokenizer,
                "fingerprint": job.fingerprint,
                "vocab_size": self._tokenizer.vocab_size,
                "bos_id": self._tokenizer.bos_id,
                "eos_id": self._tokenizer.eos_id,
            },
            inputs=[{"file": job.inputs}],
            files=files,
            command="llama-dist train (a stream)",
            reading=asdict(job.reading),
            skipped=self._read.skipped,
        )
        write_file(job.folder / MANIFEST, self._manifest.to_json())  # which syncs the folder, and so the names in it
        for name in before.files if before is not None else ():
            if name not in files:
                (job.folder / name).unlink(missing_ok=True)

    def _write_progress(self, pairs: int) -> list[str]:
        """The names of the files that say how far the text was read by the end of so many pairs."""
        read, counts = (END, f"{COUNTS}-{END}") if self.ended else (_name(READ, pairs), _name(COUNTS, pairs))
        write_file(self._job.folder / read, json.dumps(asdict(self._read)).encode())
        write_file(self._job.folder / counts, json.dumps(self._counts.tolist()).encode())
        return [read, counts]


def _name(what: str, pairs: int) -> str:
    return f"{what}-{pairs:05d}.json"


def _wanted(folder: Path) -> int:
    """How many tokens the ranks have asked for so far; older wishes are removed."""
    try:
        names = sorted(os.listdir(folder / WANTED))
    except FileNotFoundError:
        return 0
    for name in names[:-1]:
        (folder / WANTED / name).unlink(missing_ok=True)
    return int(names[-1]) if names else 0
