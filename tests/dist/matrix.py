"""The parity matrix: which layouts and settings are held against one plain process. Not a test; `test_matrix.py` is.

    python tests/dist/matrix.py                       all of it, on two cores in three quarters of an hour
    python tests/dist/matrix.py --only tp2-pp2        the cases that have this in their names
    python tests/dist/matrix.py --case NAME           one case, by the name that a failure was reported under

Every case trains five AdamW steps with clipping in float32 and must give the losses, gradient norms, weights, moments
and log-probabilities of one plain process within the limits of `parity.py`, with all copies of a weight the same bits.

Fully crossed, with every (dp, tp, pp, cp) of {1, 2, 4} on at most 4 ranks (15 layouts):
    ZeRO 1, 2, 3  x  every schedule where pp > 1  x  sequence parallelism off and on where tp > 1
    x  no, full, selective and every-second-layer recomputation
    x  three models: as many key/value heads as heads; tied with two key/value heads; one key/value head
On 8 ranks (tp2 pp2 dp2, pp4 dp2, tp4 pp2, cp2 tp2 pp2): ZeRO x schedule.
Of all else (micro-batches 1 to 4, that is also fewer than stages; gathering by micro-batch or by step under ZeRO-3;
document masks; uneven stages; on 8 ranks also recomputation, model and sequence parallelism) each crossed combination
gets the one choice that brings most triples of settings which no case before it had: `combined` is deterministic.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import queue
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(path) for path in (HERE, HERE.parent, HERE.parents[1]) if str(path) not in sys.path]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import deepspeed  # noqa: E402
import torch  # noqa: E402
from parity import LIMITS, TRAINED, Deviation, compare, plain, train_on_rank  # noqa: E402
from small_runs import Case  # noqa: E402
from workers import Pool, WorkerFailure  # noqa: E402

from llama_dist.layout import Layout  # noqa: E402

SIZES = (1, 2, 4)
SMALL = [layout for sizes in itertools.product(SIZES, repeat=4) if (layout := Layout(*sizes)).world <= 4]
LARGE = [Layout(dp=2, tp=2, pp=2), Layout(dp=2, pp=4), Layout(dp=1, tp=4, pp=2), Layout(dp=1, cp=2, tp=2, pp=2)]
MODELS = {
    "untied": {"kv_heads": 8},
    "tied, grouped queries": {"kv_heads": 2, "tied": True},
    "one key/value head": {"kv_heads": 1},
}

Choice = dict[str, object]  # one choice of each setting, by the setting's name
CROSSED = ("layout", "zero", "schedule", "sequence_parallel", "recompute", "model")
CROSSED_LARGE = ("layout", "zero", "schedule")


def choices() -> Iterator[Choice]:
    """The whole space: every allowed combination of all settings."""
    for layout in (*SMALL, *LARGE):
        settings = {"layout": (layout,), **_settings(layout)}
        for values in itertools.product(*settings.values()):
            choice = dict(zip(settings, values, strict=True))
            if _is_allowed(choice):
                yield choice


def _settings(layout: Layout) -> dict[str, tuple[object, ...]]:
    piped = layout.pp > 1
    return {
        "zero": (1, 2, 3),
        "schedule": ("1f1b", "gpipe", "interleaved", "zb-h1") if piped else ("1f1b",),
        "sequence_parallel": (False, True) if layout.tp > 1 else (False,),
        "recompute": ("none", "full", "selective", 2),
        "model": tuple(MODELS),
        "microbatches": (1, 2, 3, 4),
        "gather": ("microbatch", "step"),
        "document_mask": (False, True),
        "uneven": (False, True) if piped else (False,),
    }


def _is_allowed(choice: Choice) -> bool:
    rounds = choice["schedule"] != "interleaved" or choice["microbatches"] % choice["layout"].pp == 0
    return rounds and (choice["gather"] == "microbatch" or choice["zero"] == 3)


def case_of(choice: Choice) -> Case:
    """The run that a choice stands for: the smallest model and batch that show it."""
    layout, settings = choice["layout"], dict(choice)
    virtual = 2 if choice["schedule"] == "interleaved" else 1
    chunks = layout.pp * virtual
    uneven = settings.pop("uneven")
    layers = max(4, chunks + uneven)
    group = layout.dp * settings.pop("microbatches")
    batch = next(size for size in itertools.count(8) if size % group == 0)
    return Case(
        **asdict(settings.pop("layout")),
        **MODELS[settings.pop("model")],
        **settings,
        virtual_stages=virtual,
        stage_layers=(1,) * (chunks - 1) + (layers - chunks + 1,) if uneven else None,
        layers=layers,
        global_batch=batch,
        micro_batch=batch // group,
    )


def tuples_of(space: Sequence[Choice], strength: int) -> list[list[tuple[int, ...]]]:
    """For each choice, every combination of `strength` of its settings; a setting and its value are one number."""
    numbers: dict[tuple[str, object], int] = {}
    coded = [[numbers.setdefault(item, len(numbers)) for item in choice.items()] for choice in space]
    return [list(itertools.combinations(sorted(code), strength)) for code in coded]


def pairwise_cover(space: Sequence[Choice], *, strength: int = 2, seed: int = 0, sample: int = 100) -> list[Choice]:
    """Some of `space`, in which every combination of `strength` settings occurs that occurs in it at all.

    Greedy and deterministic: of a random sample of choices, all with one combination that is still missing, the next
    is the choice that has most such combinations.
    """
    shown = tuples_of(space, strength)
    where: dict[tuple[int, ...], list[int]] = {}
    for index, tuples in enumerate(shown):
        for one in tuples:
            where.setdefault(one, []).append(index)
    # The rarest first: what many choices have comes along by itself.
    missing = dict.fromkeys(sorted(where, key=lambda one: (len(where[one]), one)))
    random_, chosen = random.Random(seed), []
    while missing:
        candidates = where[next(iter(missing))]
        candidates = random_.sample(candidates, min(sample, len(candidates)))
        best = max(candidates, key=lambda index: sum(one in missing for one in shown[index]))
        chosen.append(space[best])
        for one in shown[best]:
            missing.pop(one, None)
    return chosen


def combined(space: Sequence[Choice], crossed: tuple[str, ...], *, seed: int = 0, sample: int = 24) -> list[Choice]:
    """One choice for every combination of the `crossed` settings; what is not crossed covers triples as it goes."""
    shown = tuples_of(space, 3)
    by_combination: dict[tuple[object, ...], list[int]] = {}
    for index, choice in enumerate(space):
        by_combination.setdefault(tuple(choice[name] for name in crossed), []).append(index)
    random_, seen, chosen = random.Random(seed), set(), []
    for candidates in by_combination.values():
        candidates = random_.sample(candidates, min(sample, len(candidates)))
        best = max(candidates, key=lambda index: sum(one not in seen for one in shown[index]))
        seen.update(shown[best])
        chosen.append(space[best])
    return chosen


def full_matrix() -> list[Case]:
    """Every case of the matrix, those of one layout together: a change of layout makes new process groups."""
    space = list(choices())
    small = combined([choice for choice in space if choice["layout"] in SMALL], CROSSED)
    large = combined([choice for choice in space if choice["layout"] in LARGE], CROSSED_LARGE)
    return in_order(case_of(choice) for choice in (*small, *large))


def pairwise_subset() -> list[Case]:
    """Cases in which every allowed pair of settings occurs, a layout being one setting."""
    return in_order(case_of(choice) for choice in pairwise_cover(list(choices())))


def in_order(cases: Iterable[Case]) -> list[Case]:
    return sorted(dict.fromkeys(cases), key=lambda case: (case.world, str(case.layout), case.kv_heads, str(case)))


@dataclass
class Report:
    """What came of the cases so far; prints what fails as it fails."""

    total: int
    command: str
    done: int = 0
    failed: list[str] = field(default_factory=list)
    largest: dict[str, tuple[float, str]] = field(default_factory=lambda: dict.fromkeys(LIMITS, (0.0, "")))
    started_at: float = field(default_factory=time.monotonic)

    def add(self, case: Case, found: Deviation, seconds: float) -> None:
        self.done += 1
        for kind, value in found.largest.items():
            if not value <= self.largest[kind][0]:
                self.largest[kind] = (value, str(case))
        if found.problems:
            self.failed.append(str(case))
            more = f" (and {len(found.problems) - 1} more)" if len(found.problems) > 1 else ""
            print(f"FAILED {case}: {found.problems[0]}{more}", flush=True)
        elif sys.stderr.isatty():
            of = f" of {self.total}" if self.total else ""
            line = f"{self.done}{of} done, {len(self.failed)} failed; {case}: {seconds:.1f} s"
            print(f"\r{line}\x1b[K", end="", file=sys.stderr)
        elif self.done % 100 == 0:
            minutes = (time.monotonic() - self.started_at) / 60
            print(f"{self.done} of {self.total} done, {len(self.failed)} failed, {minutes:.0f} minutes", flush=True)

    def close(self) -> int:
        """Print the sums; the exit status."""
        minutes = (time.monotonic() - self.started_at) / 60
        passed = self.done - len(self.failed)
        print(f"\n{self.done} cases, {passed} passed, {len(self.failed)} failed, in {minutes:.1f} minutes")
        for kind, (value, where) in self.largest.items():
            print(f"largest deviation of {kind}: {value:.2e} (limit {LIMITS[kind]:.0e}), {where}")
        git = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(git, cwd=HERE, capture_output=True, text=True, check=False).stdout.strip()
        print(
            f"{time.strftime('%Y-%m-%d %H:%M %Z')}; commit {commit or 'unknown'}; Python {platform.python_version()}, "
            f"torch {torch.__version__}, DeepSpeed {deepspeed.__version__}; {os.cpu_count()} cores"
        )
        for name in self.failed:
            print(f"again: {self.command} --case {name}")
        return 1 if self.failed or self.done < self.total or not self.done else 0


def run_cases(
    cases: Sequence[Case], report: Report, *, processes: int, steps: int = TRAINED, seconds: float = 120.0
) -> int:
    """Hold each case against the truth, as many side by side as make `processes` workers; the exit status."""
    for world, members in itertools.groupby(cases, key=lambda case: case.world):
        waiting: queue.SimpleQueue[Case] = queue.SimpleQueue()
        for case in members:
            waiting.put(case)
        lock = threading.Lock()
        lanes = [
            threading.Thread(target=_run_lane, args=(world, waiting, report, lock, steps, seconds), daemon=True)
            for _ in range(max(1, processes // world))
        ]
        for lane in lanes:
            lane.start()
        for lane in lanes:
            lane.join()
    return report.close()


def _run_lane(
    world: int, waiting: queue.SimpleQueue[Case], report: Report, lock: threading.Lock, steps: int, seconds: float
) -> None:
    """Run cases in one pool of workers until none waits."""
    pool = Pool(world)
    try:
        while True:
            case, started_at = waiting.get_nowait(), time.monotonic()
            try:
                trained = pool.run(train_on_rank, case, steps, timeout=seconds)
                with lock:  # the truth is computed once, whoever asks first
                    found = compare(case, trained, plain(case, steps=steps))
            except (WorkerFailure, OSError) as failure:  # OSError: workers that died before the call
                print(f"\n{failure}", file=sys.stderr)
                found = Deviation(problems=[last_line(str(failure))])
            with lock:
                report.add(case, found, time.monotonic() - started_at)
    except queue.Empty:
        pass
    finally:
        pool.end()


def last_line(text: str) -> str:
    """What a failure of a worker is about: the error, or that ranks gave no answer."""
    silent = re.search(r"ranks \[.*?\] gave no answer within \S+ s", text)
    error = re.compile(r"\w[\w.]*(Error|Exception|Interrupt)\b|the process ended")
    errors = [line for line in text.splitlines() if error.match(line)]
    return errors[0] if errors else silent.group() if silent else text.splitlines()[0]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", metavar="TEXT", default="", help="cases that have this in their names")
    parser.add_argument("--case", metavar="NAME", type=Case.parse, help="this case alone")
    parser.add_argument("--pairwise", action="store_true", help="the subset that the test suite runs")
    parser.add_argument("--list", action="store_true", help="print the names and run nothing")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="workers at a time, at least one case's")
    parser.add_argument("--seconds", type=float, default=120.0, help="after which a case is taken to hang")
    chosen = parser.parse_args(arguments)
    cases = [chosen.case] if chosen.case else pairwise_subset() if chosen.pairwise else full_matrix()
    cases = [case for case in cases if chosen.only in str(case)]
    if chosen.list:
        print(*cases, sep="\n")
        return 0
    torch.set_num_threads(1)
    report = Report(len(cases), command="python tests/dist/matrix.py")
    return run_cases(cases, report, processes=chosen.processes, seconds=chosen.seconds)


if __name__ == "__main__":
    sys.exit(main())
