"""Samples of text that is tokenised while it is trained on: the reading side of a spool.

The spool of a stream is a shard directory that grows: one process reads the text in order and adds pairs of shards
(spool.py), and every rank takes its samples from what is there. A spool is kept, so a run that goes on, and each
further epoch, read it and tokenise nothing twice; it can be inspected, verified, and named as shards by other runs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import numpy as np

from llama_dist.config_data import StreamSource
from llama_dist.data.inputs import DATASETS, kind_of
from llama_dist.data.manifest import MANIFEST
from llama_dist.data.order import key_of, permute, shuffled
from llama_dist.data.rows import Reading
from llama_dist.data.samples import Concatenated, Rows, Span
from llama_dist.data.shards import Shards
from llama_dist.errors import RunError, UserError

log = logging.getLogger(__name__)

STREAMS = "stream"  # folder in a run's for its spools
END = "END.json"  # in the manifest of a spool: there is no more text
ERROR = "ERROR.json"  # why the process that adds to it ended
WANTED = "wanted"  # folder of empty files, whose names are numbers of tokens that ranks will need
POLL_SECONDS = 0.05
ABOUT_DATASETS = ("name", "data_files", "data_dir", "revision")


@dataclass(frozen=True)
class Spools:
    """Where the spools of a run lie, and how long a rank waits for text that is not there yet (0: not at all)."""

    folder: Path
    wait_seconds: float = 0.0


class Stream:
    """The samples of a spool: `Samples` of data/samples.py.

    Sample i is tokens [i * seq_len, (i + 1) * seq_len] of all documents one after another. In the first epoch each
    `window` samples have an order of their own, the last window being as long as what is left. From the second epoch
    on, when all is there, the order is that of shards. So it is a function of the position and the text alone, whenever
    that comes. `size` is None until the text has ended.

    `at` waits for the whole of a window; raises what ended the process that adds to the spool, or RunError where it
    does not come within `wait_seconds`.
    """

    def __init__(self, folder: Path, seq_len: int, *, window: int, wait_seconds: float = 0.0) -> None:
        self.size: int | None = None
        self._folder = folder
        self._seq_len = seq_len
        self._window = window
        self._wait_seconds = wait_seconds
        self._wanted = self._num_tokens = 0
        self._version: tuple[int, int] | None = None
        self._shards: Shards | None = None
        self._samples: Concatenated | None = None

    @property
    def shards(self) -> Shards:
        """What is there so far. Raises UserError where nothing is."""
        if self._shards is None and not self._look():
            raise UserError(f"{self._folder}: there is no text of this stream yet; it comes when the run is started")
        assert self._shards is not None
        return self._shards

    def at(self, own: np.ndarray, *, seed: int, number: int) -> np.ndarray:
        own = np.asarray(own, dtype=np.int64)
        if own.size:
            self._await(int(own.max()))
        sample = np.empty_like(own)
        windows = own // self._window if self.size is None else np.minimum(own, self.size) // self._window
        for window in np.unique(windows).tolist():
            first = window * self._window
            count = self._window if self.size is None else min(self._window, self.size - first)
            here = (windows == window) & (own < first + count)
            if here.any():
                sample[here] = first + permute(own[here] - first, count, key_of(seed, number, "window", window))
        if self.size is not None and own.size and own.max() >= self.size:
            again = own >= self.size
            sample[again] = shuffled(own[again], self.size, seed=seed, number=number)
        return sample

    def rows(self, samples: np.ndarray) -> Rows:
        return self._there().rows(samples)

    def prefetch(self, samples: np.ndarray) -> None:
        self._there().prefetch(samples)

    def spans(self, sample: int) -> list[Span]:
        return self._there().spans(sample)

    def _there(self) -> Concatenated:
        assert self._samples is not None, "samples are those that `at` gave"
        return self._samples

    def _await(self, own: int) -> None:
        """Return when the whole window of a position is there, or the end of the text."""
        needed = (own // self._window + 1) * self._window * self._seq_len + 1
        deadline = time.monotonic() + self._wait_seconds
        while self.size is None:
            self._want(needed)
            if needed <= self._num_tokens:
                return
            failed = self._failure()  # looked for before the text: what came until then is still good
            if self._look():
                continue
            if failed is not None:
                raise failed
            if time.monotonic() >= deadline:
                raise self._too_late(needed)
            time.sleep(POLL_SECONDS)

    def _want(self, tokens: int) -> None:
        """Tell the writer how far it must be."""
        if tokens > self._wanted and self._wait_seconds:
            self._wanted = tokens
            folder = self._folder / WANTED
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{tokens:016d}").touch()

    def _look(self) -> bool:
        """Take up what has been added; returns whether anything has."""
        try:
            found = os.stat(self._folder / MANIFEST)
        except FileNotFoundError:
            return False
        version = (found.st_ino, found.st_mtime_ns)
        if version == self._version:
            return False
        shards = Shards(self._folder)
        assert shards.manifest is not None, "a folder of shards has a manifest"
        ended = END in shards.manifest.files
        if ended or shards.num_tokens > self._seq_len:
            self._samples = Concatenated(shards, self._seq_len)
        self._shards, self._version, self._num_tokens = shards, version, shards.num_tokens
        if ended and self._samples is not None:
            self.size = self._samples.size
            log.info("%s: the text ended after %d samples; from there on it is read again", self._folder, self.size)
        return True

    def _failure(self) -> Exception | None:
        try:
            said = json.loads((self._folder / ERROR).read_bytes())
        except FileNotFoundError:
            return None
        return (UserError if said["kind"] == "UserError" else RunError)(said["text"])

    def _too_late(self, needed: int) -> Exception:
        has = f"{self._folder}: has {self._num_tokens} tokens of the stream, and the first {needed} are needed"
        if not self._wait_seconds:
            return UserError(f"{has}; the run has not come that far")
        return RunError(
            f"{has}; they did not come in {self._wait_seconds:.0f} seconds; is the source slow to answer (see the log "
            "of the stream in the run's logs folder), or the run folder not shared by all nodes? Raise "
            "train.timeout_seconds, lower the stream's window, or prepare the text first"
        )


def spelled(stream: StreamSource) -> str:
    """A stream as an input of `list_inputs`. Raises UserError where its settings contradict each other."""
    arguments = [(name, getattr(stream, name)) for name in ABOUT_DATASETS]
    given = [(name, value) for name, value in arguments if value is not None]
    if stream.split != "train":
        given.append(("split", stream.split))
    if kind_of(stream.path) is None:
        return f"{DATASETS}{stream.path}" + ("?" + urlencode(given, doseq=True) if given else "")
    if given:
        raise UserError(
            f"stream.path={stream.path!r}: names files, and stream.{given[0][0]} is for data sets; leave it out, or "
            "give the kind of file as path (json, csv, text, parquet) and the files as stream.data_files"
        )
    return stream.path


def reading_of(stream: StreamSource) -> Reading:
    return Reading(text=stream.text, template=stream.template, txt=stream.txt)


def identity_of(stream: StreamSource, fingerprint: str, *, window: bool = True) -> str:
    """A hash of what a stream's samples are made of: its settings, and the tokenizer of `fingerprint`."""
    without = {"max_skipped"} if window else {"max_skipped", "window"}
    settings = stream.model_dump(mode="json", exclude=without)
    return hashlib.sha256(json.dumps([settings, fingerprint], sort_keys=True).encode()).hexdigest()


def spool_of(stream: StreamSource, fingerprint: str, folder: Path) -> Path:
    """Where in `folder` the spool of a stream is: equal text has one spool, whatever the order of its samples."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", stream.path).strip("-.")[-40:]
    return folder / f"{name or 'text'}-{identity_of(stream, fingerprint, window=False)[:8]}"
