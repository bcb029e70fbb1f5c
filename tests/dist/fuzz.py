"""Random layouts and model shapes against one plain process, for as long as is asked.

    python tests/dist/fuzz.py --minutes 20 --seed 1
    python tests/dist/fuzz.py --case NAME             one case again, by the name that a failure was reported under

Odd sizes on up to eight ranks: axes of three, vocabularies and widths that are no powers of two, one to seven
micro-batches, odd sequence lengths, uneven stages, several virtual stages, documents, targets that do not count. Three
AdamW steps in float32 must be those of one plain process, within the limits of `parity.py`. Between them come settings
that do not fit, which config or `fit_layout` must refuse, and their neighbours that do. Case i of seed s is always the
same.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(path) for path in (HERE, HERE.parent, HERE.parents[1]) if str(path) not in sys.path]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from matrix import Report, last_line  # noqa: E402
from parity import Deviation, compare, plain, train_on_rank  # noqa: E402
from small_runs import Case  # noqa: E402
from workers import Pool, WorkerFailure  # noqa: E402

from llama_dist.config import fit_layout  # noqa: E402
from llama_dist.config_checks import divisors  # noqa: E402
from llama_dist.errors import UserError  # noqa: E402

STEPS = 3
POSITIONS = 32  # of the small model
BLOCK = 10  # cases in a row on the same number of ranks, so that a pool of workers serves them all
MISFITS = 5  # for every case that runs


def draw(seed: int, index: int) -> Case:
    """A case that fits."""
    worlds = random.Random(f"{seed}, block {index // BLOCK}")
    world = worlds.choice((1, 2, 3, 4, 4, 5, 6, 6, 7, 8, 8))
    chosen = random.Random(f"{seed}, case {index}")
    dp, tp, pp, cp = _axes(world, chosen)
    sequence_parallel = tp > 1 and chosen.random() < 0.5
    schedule, virtual = _schedule(pp, chosen)
    chunks = pp * virtual
    layers = chunks + chosen.randrange(3)
    heads, kv_heads = _heads(tp, cp, chosen)
    zero = chosen.choice((1, 2, 3, 3))
    micro_batch = chosen.randint(1, 3)
    count = pp * chosen.randint(1, max(1, 8 // pp)) if schedule == "interleaved" else chosen.randint(1, 7)
    unit = cp * (tp if sequence_parallel else 1)
    return Case(
        dp=dp,
        tp=tp,
        pp=pp,
        cp=cp,
        zero=zero,
        schedule=schedule,
        virtual_stages=virtual,
        stage_layers=_composition(layers, chunks, chosen) if chosen.random() < 0.4 else None,
        sequence_parallel=sequence_parallel,
        recompute=chosen.choice(["none", "full", "selective", *range(2, layers + 1)]),
        gather=chosen.choice(("microbatch", "step")) if zero == 3 else "microbatch",
        micro_batch=micro_batch,
        global_batch=dp * count * micro_batch,
        seq_len=unit * chosen.randint(-(-4 // unit), max(19 // unit, 1)),
        document_mask=chosen.random() < 0.4,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        hidden=heads * chosen.choice((2, 4, 6)),
        intermediate=tp * chosen.randint(5, 30),
        vocab=tp * chosen.randint(11, 50),
        tied=chosen.random() < 0.4,
        grad_clip=chosen.choice((0.0, 0.3, 50.0)),
        masked=chosen.random() < 0.3,
    )


def _axes(world: int, chosen: random.Random) -> tuple[int, ...]:
    """dp, tp, pp and cp, whose product is `world`."""
    axes = [1, 1, 1, 1]
    for prime in _primes(world):
        axes[chosen.randrange(4)] *= prime
    # More than four heads or stages make the tiny model a large one.
    return tuple(axes) if max(axes[1:]) <= 4 else (world, 1, 1, 1)


def _primes(number: int) -> list[int]:
    return [prime for prime in (2, 3, 5, 7) for power in (1, 2, 3) if number % prime**power == 0]


def _schedule(pp: int, chosen: random.Random) -> tuple[str, int]:
    schedule = chosen.choice(("1f1b", "gpipe", "interleaved", "zb-h1"))
    return schedule, chosen.randint(2, 3 if pp < 4 else 2) if schedule == "interleaved" else 1


def _heads(tp: int, cp: int, chosen: random.Random) -> tuple[int, int]:
    """Heads and key/value heads that the ranks can share out."""
    heads = tp * cp * chosen.choice((1, 2, 3))
    fit = [kv for kv in divisors(heads) if not _kv_misfits(kv, tp, cp)]
    return heads, chosen.choice(fit)


def _kv_misfits(kv_heads: int, tp: int, cp: int) -> bool:
    local = max(kv_heads // tp, 1)
    return bool((kv_heads % tp and tp % kv_heads) or (local % cp and cp % local))


def _composition(total: int, parts: int, chosen: random.Random) -> tuple[int, ...]:
    edges = sorted(chosen.sample(range(1, total), parts - 1))
    return tuple(stop - start for start, stop in zip([0, *edges], [*edges, total], strict=True))


def misfits(case: Case) -> list[str]:
    """Why a case cannot run, said anew from what the axes mean and not by the checks of the config."""
    share, chunks = case.global_batch // case.dp, case.pp * case.virtual_stages
    stages = case.stage_layers
    reasons = {
        "key/value heads of unequal groups": case.heads % case.kv_heads,
        "heads of unequal width": case.hidden % case.heads,
        "heads of odd width": case.hidden // case.heads % 2,
        "heads": case.heads % (case.tp * case.cp),
        "key/value heads": _kv_misfits(case.kv_heads, case.tp, case.cp),
        "vocabulary": case.vocab % case.tp,
        "width": case.intermediate % case.tp,
        "sequence": case.seq_len % (case.cp * (case.tp if case.sequence_parallel else 1)),
        "positions": case.seq_len > POSITIONS,
        "layers": case.layers < chunks,
        "stage_layers": stages is not None and (sum(stages) != case.layers or len(stages) != chunks),
        "virtual stages": (case.virtual_stages > 1) != (case.schedule == "interleaved"),
        "batch": case.global_batch % case.dp or not share,
        "rounds": case.schedule == "interleaved" and share % case.pp,  # micro-batches of one sequence do it, if any
        "recomputation": isinstance(case.recompute, int) and case.recompute > case.layers,
    }
    return [reason for reason, wrong in reasons.items() if wrong]


def disturbed(case: Case, chosen: random.Random) -> Case:
    """The case with one setting changed, most often to what does not fit."""
    sizes = ("heads", "kv_heads", "vocab", "intermediate", "seq_len", "layers", "hidden", "global_batch")
    name = chosen.choice((*sizes, "dp", "tp", "pp", "cp", "virtual_stages", "schedule", "stage_layers"))
    if name == "schedule":
        return replace(case, schedule="1f1b" if case.schedule == "interleaved" else "interleaved")
    if name == "stage_layers":
        return replace(case, stage_layers=(*(case.stage_layers or (case.layers,)), 1))
    return replace(case, **{name: max(1, getattr(case, name) + chosen.choice((-1, 1, 2)))})


def is_accepted(case: Case, world: int) -> bool:
    """Whether config and `fit_layout` would let the case start on `world` ranks."""
    try:
        fit_layout(case.run, world)
    except UserError as error:
        assert str(error).strip(), "a refusal says why"
        return False
    return True


def check_refusals(case: Case, chosen: random.Random) -> tuple[int, list[str]]:
    """How many settings near the case were refused; and where config and meaning disagree."""
    refused, problems = 0, []
    for other in (case, *(disturbed(case, chosen) for _ in range(MISFITS))):
        reasons = misfits(other)
        if is_accepted(other, other.world) == bool(reasons):
            problems.append(f"{other} is {'accepted' if reasons else 'refused'}, but misfits are {reasons}")
        refused += bool(reasons)
    for world in (case.world + 1, 2 * case.world):
        if is_accepted(case, world):
            problems.append(f"{case} is accepted on {world} ranks")
    return refused, problems


class Pools:
    """A pool of workers for the number of ranks that was asked for last."""

    def __init__(self) -> None:
        self._pool: Pool | None = None

    def __call__(self, world: int) -> Pool:
        if self._pool is None or self._pool.world != world:
            self.end()
            self._pool = Pool(world)
        return self._pool

    def end(self) -> None:
        if self._pool is not None:
            self._pool.end()


def run_case(case: Case, pools: Pools, *, seconds: float) -> Deviation:
    try:
        trained = pools(case.world).run(train_on_rank, case, STEPS, timeout=seconds)
    except (WorkerFailure, OSError) as failure:
        print(f"\n{failure}", file=sys.stderr)
        return Deviation(problems=[last_line(str(failure))])
    return compare(case, trained, plain(case, steps=STEPS))


def fuzz(report: Report, next_case: Callable[[int], Case | None], *, seed: int, seconds: float) -> int:
    """Run cases until there is none; the exit status."""
    pools, index, refused = Pools(), 0, 0
    try:
        while (case := next_case(index)) is not None:
            started_at = time.monotonic()
            some, problems = check_refusals(case, random.Random(f"{seed}, misfits {index}"))
            refused += some
            found = Deviation(problems=problems)
            if not misfits(case):
                found = run_case(case, pools, seconds=seconds)
                found.problems += problems
            if found.problems:
                print(f"seed {seed}, case {index}:", flush=True)
            report.add(case, found, time.monotonic() - started_at)
            index += 1
    finally:
        pools.end()
    print(f"\nseed {seed}: {refused} settings that do not fit were refused")
    return report.close()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start", type=int, default=0, metavar="INDEX", help="begin with this case of the seed")
    parser.add_argument("--case", metavar="NAME", type=Case.parse, help="this case alone")
    parser.add_argument("--seconds", type=float, default=120.0, help="after which a case is taken to hang")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    end_at = time.monotonic() + 60 * chosen.minutes

    def next_case(index: int) -> Case | None:
        if chosen.case:
            return chosen.case if index == 0 else None
        return draw(chosen.seed, chosen.start + index) if time.monotonic() < end_at else None

    report = Report(total=0, command="python tests/dist/fuzz.py")
    return fuzz(report, next_case, seed=chosen.seed, seconds=chosen.seconds)


if __name__ == "__main__":
    sys.exit(main())
