"""Best-fit packed samples: an index beside the shards says which pieces of documents each sample is made of.

The index of a shard directory for one seq_len is a folder in it, packed-N, behind a URL too: PACKING.json, and for each
pair of shards a file NNNNN.pack. That holds, for each sample, its first piece and then the end (samples + 1 numbers), followed by the
first token (counted from the pair's) and the size of each piece; little-endian integers of 4 bytes, or of 8 where the
pair has more tokens than that.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Final, Literal

import numpy as np
from pydantic import ConfigDict, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from llama_dist.data.best_fit import best_fit, cut_documents
from llama_dist.data.files import is_free, new_folder
from llama_dist.data.order import key_of, permute
from llama_dist.data.remote import is_url
from llama_dist.data.samples import Rows, Span
from llama_dist.data.shards import Shards
from llama_dist.data.storage import File, Storage
from llama_dist.errors import RunError, UserError
from llama_dist.files import HashingFile, check_file, write_file

PACKING = "PACKING.json"
FORMAT: Final = "llama_dist best-fit packing v1"
WORKER_TOKENS = 1 << 26  # a process takes a second to start
MAX_OPEN_FILES = 256


@dataclass(frozen=True)
class PackedPair:
    """One pair of shards and the index of it: `bytes` and `xxh3_128` are the index file's.

    `padding`: tokens that fill samples up. `cut`: documents cut because they are longer than a sample; `cut_by_concat`:
    those that have a boundary of samples inside where documents are concatenated. `short`: documents of fewer than two
    tokens, which have nothing to predict and are in no sample.
    """

    name: str
    tokens: NonNegativeInt
    documents: NonNegativeInt
    samples: NonNegativeInt
    pieces: NonNegativeInt
    padding: NonNegativeInt
    cut: NonNegativeInt
    cut_by_concat: NonNegativeInt
    short: NonNegativeInt
    bytes: NonNegativeInt
    xxh3_128: str


@dataclass(frozen=True)
class Packing:
    """What an index says of itself, in PACKING.json. `shards` identifies the shard files, wherever they lie."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    seq_len: PositiveInt
    shards: str
    pairs: list[PackedPair]
    format: Literal["llama_dist best-fit packing v1"] = FORMAT

    def total(self, what: str) -> int:
        """The sum of a number over all pairs."""
        return sum(getattr(pair, what) for pair in self.pairs)

    @property
    def padding_share(self) -> float:
        """The share of all samples' tokens that is padding."""
        return self.total("padding") / (self.total("samples") * (self.seq_len + 1))


SCHEMA = TypeAdapter(Packing)


class BestFit:
    """The samples of a shard directory, packed best-fit: `Samples` of data/samples.py.

    A sample is seq_len + 1 tokens: pieces of documents, then eos as padding. Each piece is a document of its own, and
    so is the padding. What counts as a target is each token of a piece but its first; so in an epoch each token of the
    corpus counts once, but for the first of every document (its bos), and padding never.

    Opening costs no more than reading PACKING.json; index files are opened when they are first read, by `pread` for the
    reasons that `Shards` gives. Raises UserError where there is no index, or it is of other shards or damaged.
    """

    size: int | None

    def __init__(self, shards: Shards, seq_len: int) -> None:
        self._shards = shards
        self._seq_len = seq_len
        self._place = Place.of(shards, seq_len)
        packing = self._place.load()
        if (packing.shards, packing.seq_len) != (identity_of(shards), seq_len):
            raise UserError(f"{self._place}: is of other shards; remove it and make it again {self._place.making}")
        self._pairs = packing.pairs
        self._sample_starts = [0, *accumulate(pair.samples for pair in packing.pairs)]
        self._token_starts = [0, *accumulate(pair.tokens for pair in packing.pairs)]
        if self._token_starts[-1] != shards.num_tokens:
            raise self._damaged(PACKING)
        self.size = self._sample_starts[-1]
        # No tokenizer is known of a bare pair; what padding is makes no difference.
        self._padding = shards.manifest.tokenizer["eos_id"] if shards.manifest else 0
        self._open = lru_cache(maxsize=MAX_OPEN_FILES)(self._open_file)

    def at(self, own: np.ndarray, *, seed: int, number: int) -> np.ndarray:
        """As `Samples.at`: a keyed permutation of its own for each epoch."""
        assert self.size, "an index without samples is refused when it is made"
        epoch, within = np.divmod(own, self.size)
        sample = np.empty_like(within)
        for e in np.unique(epoch).tolist():
            here = epoch == e
            sample[here] = permute(within[here], self.size, key_of(seed, number, e))
        return sample

    def rows(self, samples: np.ndarray) -> Rows:
        """As `Samples.rows`; `documents` and `counted` are always given."""
        if self._place.storage.slow:
            self.prefetch(samples)
        tokens = np.full((len(samples), self._seq_len + 1), self._padding, dtype=self._shards.dtype)
        counted = np.zeros((len(samples), self._seq_len), dtype=bool)
        documents = []
        for row, sample in enumerate(samples.tolist()):
            at, begins = 0, []
            for start, size in self._pieces(sample):
                tokens[row, at : at + size] = self._shards.tokens(start, start + size)
                counted[row, at : at + size - 1] = True
                begins.append(at)
                at += size
            if at < self._seq_len:
                begins.append(at)
            documents.append(tuple(begins))
        return Rows(tokens, tuple(documents), counted)

    def prefetch(self, samples: np.ndarray) -> None:
        """As `Samples.prefetch`."""
        for sample in samples.tolist():
            try:
                pieces = self._pieces(sample)
            except (UserError, RunError):  # whoever reads it will be told
                return
            for start, size in pieces:
                self._shards.prefetch(np.array([start]), size)

    def spans(self, sample: int) -> list[Span]:
        """As `Samples.spans`; padding is none."""
        spans = []
        for start, size in self._pieces(sample):
            document, first = self._shards.document_at(start)
            spans.append(Span(document, start - first, start - first + size))
        return spans

    def _pieces(self, sample: int) -> list[tuple[int, int]]:
        """The first token and the size of each piece of a sample."""
        assert 0 <= sample < self._sample_starts[-1], f"sample {sample} of {self._sample_starts[-1]}"
        number = bisect_right(self._sample_starts, sample) - 1
        pair, file = self._pairs[number], self._open(number)
        within = sample - self._sample_starts[number]
        first, stop = _read(file, pair, at=within, count=2)
        if not 0 <= first < stop <= pair.pieces:
            raise self._damaged(f"{pair.name}.pack")
        numbers = _read(file, pair, at=pair.samples + 1 + 2 * first, count=2 * (stop - first))
        starts, sizes = numbers[::2], numbers[1::2]
        inside = all(start + size <= pair.tokens for start, size in zip(starts, sizes, strict=True))
        if not inside or min(sizes) < 2 or sum(sizes) > self._seq_len + 1:
            raise self._damaged(f"{pair.name}.pack")
        offset = self._token_starts[number]
        return [(offset + start, size) for start, size in zip(starts, sizes, strict=True)]

    def _open_file(self, number: int) -> File:
        pair = self._pairs[number]
        return self._place.storage.open(f"{self._place.folder}/{pair.name}.pack", pair.bytes, pair.xxh3_128)

    def _damaged(self, name: str) -> UserError:
        return UserError(f"{self._place}/{name}: is damaged; remove {self._place} and make it again {self._place.making}")


def _read(file: File, pair: PackedPair, *, at: int, count: int) -> list[int]:
    """Some of the numbers in an index file."""
    numbers = np.empty(count, dtype=_dtype_for(pair.tokens))
    file.read_into(memoryview(numbers).cast("B"), at * numbers.itemsize)
    return numbers.tolist()


@dataclass(frozen=True)
class Place:
    """Where the index of some shards for one length lies: a folder beside them, behind a URL too.

    `making`: how to make it, as one tells people.
    """

    shards: str
    seq_len: int
    storage: Storage
    folder: str
    making: str

    @classmethod
    def of(cls, shards: Shards, seq_len: int) -> Place:
        making = f"with `{command_for(shards.path, seq_len)}`"
        if is_url(shards.path):
            making = f"with `llama-dist pack` where the shards are files, and copy it to {shards.path}"
        return cls(str(shards.path), seq_len, *shards.beside(f"packed-{seq_len}"), making)

    def __str__(self) -> str:
        return f"{self.storage.path}/{self.folder}"

    def load(self) -> Packing:
        """What the index says of itself. Raises UserError where there is none, or it is damaged."""
        name = f"{self.folder}/{PACKING}"
        if not self.storage.exists(name):
            raise UserError(
                f"{self.shards}: has no index of best-fit packed samples of data.seq_len={self.seq_len}; make it "
                f"{self.making}"
            )
        try:
            return SCHEMA.validate_json(self.storage.read(name), strict=True)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise UserError(
                f"{self}/{PACKING}: is damaged ({where}: {problem['msg']}); remove {self} and make it again {self.making}"
            ) from error


def index_folder(path: str | Path, seq_len: int) -> Path:
    """Where the index of a shard directory lies, or of a bare pair given by its prefix; not of a URL."""
    return Path(path) / f"packed-{seq_len}" if Path(path).is_dir() else Path(f"{path}.packed-{seq_len}")


def command_for(path: str | Path, seq_len: int) -> str:
    """What makes an index."""
    return f"llama-dist pack {path} --seq-len {seq_len}"


def identity_of(shards: Shards) -> str:
    """A hash of the shard files' checksums (of some of the tokens where there are none), not of where they lie."""
    if shards.manifest is None:
        files: object = shards.sample_checksums()
    else:
        held = ((name, file) for name, file in shards.manifest.files.items() if name.endswith((".bin", ".idx")))
        files = {name: (file["bytes"], file["xxh3_128"]) for name, file in held}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def load_packing(path: str | Path, seq_len: int) -> Packing:
    """What the index of a shard directory for `seq_len` says of itself. Raises UserError where there is none."""
    return Place.of(Shards(path), seq_len).load()


def find_packing_damage(path: str | Path, seq_len: int, *, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with the sizes and checksums of an index; `parts` callers can share the reading.

    Behind a URL only what it says of itself is looked at: the reader holds the rest to its shape.
    """
    place = Place.of(Shards(path), seq_len)
    pairs = place.load().pairs[part::parts]
    if is_url(path):
        return []
    folder = index_folder(path, seq_len)
    found = [check_file(folder / f"{pair.name}.pack", size=pair.bytes, checksum=pair.xxh3_128) for pair in pairs]
    return [problem for problem in found if problem]


def pack(path: str | Path, *, seq_len: int, workers: int | None = None) -> tuple[Packing, bool]:
    """Make the index of a shard directory for `seq_len`; returns it, and whether it was there already.

    Each pair is packed by itself, `workers` (default: one a core) at a time, and the memory of a worker is that for the
    documents of one pair, about 60 bytes each. The index is the same for any number of workers, and appears only when
    it is complete. Raises UserError where it cannot be written, or one of other shards is in the way.
    """
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    for name, value in (("seq_len", seq_len), ("workers", workers)):
        if value < 1:
            raise UserError(f"{name}={value}: must be at least 1")
    if is_url(path):
        raise UserError(
            f"{path}: an index is made where the shards are files; pack them there, and copy the folder "
            f"packed-{seq_len} to {path}"
        )
    shards = Shards(path)
    folder, identity = index_folder(path, seq_len), identity_of(shards)
    if not is_free(folder):
        if not (folder / PACKING).is_file():
            raise UserError(f"{folder}: is there and is no index of packed samples; remove it first")
        packing = load_packing(path, seq_len)
        if packing.shards != identity:
            raise UserError(f"{folder}: is of other shards; remove it first")
        return packing, True
    shards.check_sizes()
    useful = shards.num_tokens // WORKER_TOKENS + 1
    try:
        with new_folder(folder) as partial:
            pairs = list(_pack_all(shards, partial, seq_len, workers=min(workers, useful)))
            packing = Packing(seq_len, identity, pairs)
            if not packing.total("samples"):
                raise UserError(f"{path}: no document has two tokens, so there is nothing to predict")
            write_file(partial / PACKING, (json.dumps(asdict(packing), indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written to: {error.strerror}; the index lies beside the shards, so copy them to "
            "where there is room and you may write"
        ) from error
    return packing, False


def _pack_all(shards: Shards, folder: Path, seq_len: int, *, workers: int) -> Iterator[PackedPair]:
    """Pack every pair, in order."""
    prefixes, offset = [shards.path], 0
    if shards.manifest is not None:
        prefixes = [shards.path / name.removesuffix(".bin") for name in shards.manifest.files if name.endswith(".bin")]
    offsets = []
    for prefix in prefixes:
        offsets.append(offset)
        offset += Path(f"{prefix}.bin").stat().st_size // shards.dtype.itemsize
    work = ([str(prefix) for prefix in prefixes], offsets, [str(folder)] * len(prefixes), [seq_len] * len(prefixes))
    if min(workers, len(prefixes)) == 1:
        yield from map(_pack_pair, *work)
        return
    pool = ProcessPoolExecutor(
        min(workers, len(prefixes)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=signal.signal,  # Ctrl-C reaches the whole process group; the parent alone answers it
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )
    try:
        yield from pool.map(_pack_pair, *work)
    except BrokenProcessPool as error:
        raise UserError(
            "pack: a worker process died, most likely because memory ran out; use fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _pack_pair(prefix: str, offset: int, folder: str, seq_len: int) -> PackedPair:
    """Pack one pair, whose first token is number `offset` of the corpus, into a file of `folder`."""
    pair = Shards(prefix)
    lengths = pair.document_lengths()
    starts, sizes = cut_documents(lengths, seq_len)
    order, counts = best_fit(sizes, seq_len + 1)
    name = Path(prefix).name
    numbers = np.zeros(len(counts) + 1 + 2 * len(sizes), dtype=_dtype_for(pair.num_tokens))
    numbers[1 : len(counts) + 1] = np.cumsum(counts)
    numbers[len(counts) + 1 :: 2], numbers[len(counts) + 2 :: 2] = starts[order], sizes[order]
    with HashingFile(Path(folder) / f"{name}.pack") as file:
        file.write(numbers)
    begins = offset + np.cumsum(lengths) - lengths
    return PackedPair(
        name=name,
        tokens=pair.num_tokens,
        documents=pair.num_documents,
        samples=len(counts),
        pieces=len(sizes),
        padding=len(counts) * (seq_len + 1) - int(sizes.sum()),
        cut=int((lengths > seq_len + 1).sum()),
        # A boundary between a document's first token and the last that is followed by one of its own.
        cut_by_concat=int(((begins + lengths - 2) // seq_len > begins // seq_len)[lengths > 1].sum()),
        short=int((lengths < 2).sum()),
        bytes=file.size,
        xxh3_128=file.checksum,
    )


def _dtype_for(num_tokens: int) -> np.dtype:
    return np.dtype("<u4" if num_tokens < 1 << 32 else "<u8")
