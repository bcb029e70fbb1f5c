"""Cleaning: filters, held-out texts and duplicates out of any amount of text, in bounded memory.

Three steps. First workers look at each document by itself, a unit of the inputs at a time: filters, then the search
for held-out runs; what stays is written, with a hash of its text, a MinHash signature and the keys of its bands in
sorted runs. Then one process goes through these keys, a range at a time, and joins duplicates to clusters, in each of
which the first document of the inputs stays. Last, workers copy what stays. Everything is in the order of the inputs,
so nothing depends on the number of workers.

In memory each worker has a document and some millions of keys, the process between them a range of keys; the held-out
runs are in one table that all share. On the disk (a folder `work` beside the results, gone at the end) the texts lie
twice for a while, and each document takes about 800 bytes more while near duplicates are looked for.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from llama_dist.data.clean.choices import Choices
from llama_dist.data.clean.clusters import KEPT, Clusters
from llama_dist.data.clean.duplicates import Signatures, find_exact, find_near
from llama_dist.data.clean.filters import Filters
from llama_dist.data.clean.jsonl import JsonlWriter
from llama_dist.data.clean.overlap import HeldOut, index_held_out
from llama_dist.data.clean.pool import Pool
from llama_dist.data.clean.report import Counts, Report, Tally
from llama_dist.data.clean.work import UNREADABLE, Job, Judged, drop_duplicates, judge, paths_of, unreadable_of
from llama_dist.data.documents import read_documents, with_line
from llama_dist.data.files import checksum_of, is_free, new_folder
from llama_dist.data.inputs import list_inputs
from llama_dist.data.opening import is_url
from llama_dist.data.skips import TOLD, SkipLimit, keep_list, lines_of, list_beside, too_many
from llama_dist.data.units import Unit, unit_size, units_of
from llama_dist.data.words import counted
from llama_dist.data.workers import stoppable
from llama_dist.errors import UserError
from llama_dist.files import BLOCK, HashingFile, sync_folder, write_file

REPORT, REMOVED, HELD_OUT, TEXT = "report.json", "removed", "held-out", "text"
MOST_HIT = 5
Tell = Callable[[str], None]


def clean(
    inputs: Sequence[str | Path],
    out: str | Path | None,
    choices: Choices,
    *,
    workers: int | None = None,
    unit_bytes: int | None = None,
    command: str = "",
    tell: Tell = lambda line: None,
) -> Report:
    """Clean `inputs` into the folder `out`, which appears when it is complete.

    It holds `text/00000.jsonl.zst` and so on (not with `report_only`), `removed.jsonl.zst` with everything that was
    taken out and why, with `against` also `held-out.jsonl.zst` with the held-out texts that were hit, and
    `report.json`. `out` may be None with `report_only`. Raises UserError for bad inputs and choices, where `out` is
    taken, and where more documents than `max_skipped` cannot be read.
    """
    workers = workers if workers is not None else os.cpu_count() or 1
    if workers < 1:
        raise UserError(f"workers={workers}: at least 1 process is needed; leave it out for one a core")
    if out is None and not choices.report_only:
        raise UserError("out: give the folder to make, or --report-only")
    if out is not None and not is_free(Path(out)):
        raise UserError(f"{out}: is there already; remove it first, or choose another --out")
    Filters(choices.filters)  # says what is wrong with them before any work is done
    listed = list_inputs(inputs)
    if choices.against:
        _check_apart([item.path for item in listed], [item.path for item in list_inputs(choices.against)])
    if out is not None:  # what an earlier call has left where the folder of the inputs holds its results, too
        left = os.path.abspath(list_beside(Path(out)))
        listed = [item for item in listed if is_url(item.path) or os.path.abspath(item.path) != left]
    units = units_of(listed, unit_bytes or unit_size(listed))
    report = Report(command, choices.report_only, choices.as_settings(), Counts())
    folder_of = _folder(None if out is None else Path(out))
    with stoppable(), folder_of as folder, Pool(min(workers, len(units))) as pool:
        work = folder / "work"
        work.mkdir()
        _Cleaning(choices, report, None if out is None else Path(out), folder, work, pool, tell).run(units)
        shutil.rmtree(work)
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        report.files = {
            str(file.relative_to(folder)): {"bytes": file.stat().st_size, "xxh3_128": checksum_of(file)}
            for file in files
        }
        write_file(folder / REPORT, report.to_json().encode())
    if out is not None:
        list_beside(Path(out)).unlink(missing_ok=True)
    return report


@contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    """A folder that becomes `out`, or one that is only there for the work."""
    if out is not None:
        with new_folder(out) as folder:
            yield folder
    else:
        with tempfile.TemporaryDirectory(prefix="llama-dist-clean-") as name:
            yield Path(name)


def _check_apart(inputs: list[str], held_out: list[str]) -> None:
    both = sorted({os.path.realpath(path) for path in inputs} & {os.path.realpath(path) for path in held_out})
    if both:
        raise UserError(f"{both[0]}: is an input and held out, too; all of it would go; give it as one of the two")


@dataclass
class _Cleaning:
    """One call of `clean`, on the way."""

    choices: Choices
    report: Report
    out: Path | None
    folder: Path
    work: Path
    pool: Pool
    tell: Tell

    def run(self, units: Sequence[Unit]) -> None:
        held_out = self._index_held_out()
        job = self._job(held_out)
        judged = []
        for one in self.pool.each(judge, [(job, unit) for unit in units]):
            judged.append(one)
            self.report.counts.merge(one.counts)
            self.tell(f"looked at {len(judged):,} of {counted(len(units), 'unit')}")
        self._check_readable(judged, job)
        firsts = np.cumsum([0, *(one.counts.kept.documents for one in judged)])
        left = self._find_duplicates(judged, job, firsts) if job.deduplicates else np.diff(firsts)
        self._write_texts(job, firsts, left)
        self._join_removed(job, len(units))
        if held_out:
            self._report_held_out(held_out, [paths_of(job, unit.number).hits for unit in units])
        for tally in self.report.counts.tallies():
            tally.examples = list(map(with_line, tally.examples))

    def _index_held_out(self) -> HeldOut | None:
        choices = self.choices
        if not choices.against:
            return None
        self.tell("reading the held-out texts")
        texts = read_documents(choices.against, choices.against_reading)
        return index_held_out(texts, self.work, run_words=choices.run_words)

    def _job(self, held_out: HeldOut | None) -> Job:
        choices = self.choices
        return Job(
            folder=self.work,
            reading=choices.reading,
            filters=list(choices.filters),
            exact="exact" in choices.dedup,
            rows=choices.rows,
            held_out=held_out.table if held_out else None,
            overlap=choices.overlap,
            texts=not choices.report_only or choices.removed_texts,
            removed_texts=choices.removed_texts,
            suffix=choices.suffix,
        )

    def _check_readable(self, judged: list[Judged], job: Job) -> None:
        counts = self.report.counts
        skipped = sum(one.skipped for one in judged)
        if not SkipLimit(self.choices.max_skipped).allows(skipped, counts.came.documents):
            raise UserError(self._unreadable(job, len(judged), skipped))
        if counts.came.documents == counts.removed.get("empty", Tally()).documents:
            raise UserError("inputs: there is no document in them; give at least one file that has some")

    def _unreadable(self, job: Job, units: int, skipped: int) -> str:
        """What is said of too much that cannot be read; the list of it stays."""

        def items() -> Iterator[dict[str, str]]:
            return (item for unit in range(units) for item in unreadable_of(job, unit))

        counts = self.report.counts
        kinds = {name: tally.documents for name, tally in counts.removed.items() if name.startswith(UNREADABLE)}
        first = [(item["where"], item["reason"]) for item in islice(items(), TOLD)]
        seen = counted(counts.came.documents, "document")
        problem = too_many(
            first, skipped, seen, {name.removeprefix(UNREADABLE): n for name, n in kinds.items()},
            self.choices.max_skipped,
        )  # fmt: skip
        listed = "give --out to have them listed"
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            keep_list(list_beside(self.out), lines_of(items()))
            listed = f"{list_beside(self.out)} lists them"
        return f"{problem}; {listed}; mend them, or raise --max-skipped"

    def _find_duplicates(self, judged: list[Judged], job: Job, firsts: np.ndarray) -> np.ndarray:
        """Settles the clusters, in the work folder. Returns how many documents are left of each unit."""
        clusters = Clusters(self.work, int(firsts[-1]))
        numbered = list(zip(firsts.tolist(), judged, strict=False))
        if job.exact:
            self.tell("looking for exact duplicates")
            find_exact([(first, run) for first, one in numbered for run in one.exact], clusters)
        if job.rows:
            self.tell("looking for near duplicates")
            signatures = Signatures([(first, paths_of(job, one.number).signatures) for first, one in numbered])
            self.report.near_not_compared = find_near(
                [(first, run) for first, one in numbered for run in one.near],
                clusters,
                signatures,
                similarity=self.choices.similarity,
            )
        clusters.settle()
        bounds = zip(firsts[:-1].tolist(), firsts[1:].tolist(), strict=True)
        return np.array([int((clusters.kind[start:stop] == KEPT).sum()) for start, stop in bounds])

    def _write_texts(self, job: Job, firsts: np.ndarray, left: np.ndarray) -> None:
        """The texts that stay, in files numbered without a gap: a unit of which nothing is left has none."""
        outs: list[Path | None] = [None] * len(left)
        if not self.choices.report_only:
            text = self.folder / TEXT
            text.mkdir()
            for number, unit in enumerate(np.flatnonzero(left).tolist()):
                outs[unit] = text / f"{number:05d}{job.suffix}"
        if job.deduplicates:
            tasks = [(job, unit, firsts, out) for unit, out in enumerate(outs)]
            for done, counts in enumerate(self.pool.each(drop_duplicates, tasks), start=1):
                self.report.counts.merge(counts)
                self.tell(f"wrote {done:,} of {counted(len(tasks), 'unit')}")
        else:
            for unit, out in enumerate(outs):
                if out is not None:
                    os.rename(paths_of(job, unit).kept, out)
        if not self.choices.report_only:
            sync_folder(text)

    def _join_removed(self, job: Job, units: int) -> None:
        """One list of everything that was removed: packed or not, files of lines may be put one behind the other."""
        with HashingFile(self.folder / f"{REMOVED}{job.suffix}") as out:
            for unit in range(units):
                paths = paths_of(job, unit)
                for path in (paths.removed, paths.duplicates) if job.deduplicates else (paths.removed,):
                    with path.open("rb") as file:
                        while block := file.read(BLOCK):
                            out.write(block)

    def _report_held_out(self, held_out: HeldOut, hits: list[Path]) -> None:
        most: list[dict[str, object]] = []
        count = 0
        with JsonlWriter(self.folder / f"{HELD_OUT}{self.choices.suffix}") as out:
            for hit in held_out.hits(hits):
                count += 1
                out.add(hit._asdict())
                most = sorted([*most, hit._asdict()], key=lambda item: -item["shared"] / item["runs"])[:MOST_HIT]
        self.report.held_out = {
            "run_words": self.choices.run_words,
            "documents": len(held_out.ids) + held_out.too_short,
            "too_short": held_out.too_short,
            "hit": count,
            "most_hit": most,
        }
