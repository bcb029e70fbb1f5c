"""How long saves stop training, and how fast checkpoints are written and read, beside others: tables, and the goals.

    python benchmarks/checkpoint.py --folder FOLDER             on the disk that is to be measured
    python benchmarks/checkpoint.py --quick --repeat 1          a small model, to see that all of it runs

A LLaMA of 110 million parameters trains under ZeRO-1 on one rank and on two (gloo, one thread each, data parallel):
1.3 GB of float32 weights and moments. Each contender runs in a process of its own on every rank, taking turns, --repeat
times. It saves while training goes on: `blocked` is the time that training waits for it (in its calls, and before the
update that changes the state), for the first save and for later ones; `durable` until all is on the disk, but for
DeepSpeed, which does not wait for the disk; `slower` is how much longer the steps in between take than those without a
save, what they wait counted apart. Then with nothing else going on (`alone`), and then it loads what it has saved, with no file in memory, into the state of the engine, which is compared.
`memory` is the most that a step with the first save holds beyond one without, on all ranks.

Of times `alone` and of loads the best counts, of the others the median. DeepSpeed writes the weights a second time, as
those of the module. torch.save writes what a rank holds into a file of its own, and fsyncs it. On a machine with as
many cores as ranks a writer takes its time from the steps: there is no other.

The last table plans checkpoints of a model that no machine at hand could hold, on one core.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from checkpoint_plan import Planned, plan
from checkpoint_trial import CONTENDERS, Found, Trial
from ranks import Ranks

from llama_dist.config import RunConfig, build_config, load_model_config
from llama_dist.layout import Layout

MODEL = {
    "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 1024, "tie_word_embeddings": True,
}  # fmt: skip
QUICK = MODEL | {"vocab_size": 512, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 2}
PLANNED = Path(__file__).resolve().parents[1] / "configs" / "model" / "llama3.1-405b.yaml"
SAVED_BY, LOADED_BY = Layout(dp=128, tp=8, pp=16), Layout(dp=64, tp=8, pp=8)
OURS, WAITING, ASYNC, DCP, DEEPSPEED, TORCH = CONTENDERS
BUFFER = 256e6  # bytes that a save may hold beyond a copy of the state
STEPS = ("quiet", "stepping")
TIMES = ("written", "blocked", "durable", *STEPS)
Results = dict[tuple[int, str], list[Found]]  # by world and contender, of each turn


def build_run(args: argparse.Namespace, world: int) -> RunConfig:
    length = 32 if args.quick else args.length
    values = {
        "name": "benchmark",
        "model": QUICK if args.quick else MODEL,
        "parallel": {"dp": world, "zero": args.zero, "micro_batch": 1},
        "data": {"tokenizer": "-", "train": [{"shards": "-"}], "seq_len": length},
        "optim": {"lr": 1e-4},
        "train": {"steps": 1, "global_batch": world, "device": "cpu"},
    }
    return build_config(RunConfig, values, where="benchmarks/checkpoint.py")


def together(ranks: Sequence[Found]) -> Found:
    """What a run sees of its ranks: the longest time, all memory."""

    def longest(lists: Sequence[list[float]]) -> list[float]:
        return [max(each) for each in zip(*lists, strict=True)]

    times = {key: longest([getattr(found, key) for found in ranks]) for key in TIMES}
    return Found(
        bytes=sum(found.bytes for found in ranks),
        memory=sum(found.memory for found in ranks),
        loads={how: longest([found.loads[how] for found in ranks]) for how in ranks[0].loads},
        **times,
    )


def compete(args: argparse.Namespace) -> tuple[Results, list[str]]:
    """What was found, and what failed."""
    results: Results = {}
    failed = []
    for _ in range(args.repeat):
        for world in args.worlds:
            for name in CONTENDERS:
                if not any(word in name for word in args.only):
                    continue
                try:
                    with tempfile.TemporaryDirectory(prefix="checkpoints-", dir=args.folder) as folder:
                        with Ranks(world, Trial, build_run(args, world), name, folder) as ranks:
                            found = together(ranks.call("measure", args.saves, args.loads))
                except RuntimeError as error:
                    failed.append(f"{name}, {world}: {error}")
                    continue
                results.setdefault((world, name), []).append(found)
                load = f"load average {os.getloadavg()[0]:.1f}"
                print(f"{name}, {world}: {found}, {load}", file=sys.stderr, flush=True)
    return results, failed


class Figures:
    """The figures of the contenders on so many ranks; None for one that has none."""

    def __init__(self, results: Results, world: int) -> None:
        self._found = {name: found for (ranks, name), found in results.items() if ranks == world}
        self.names = list(self._found)

    def first_blocked(self, name: str) -> float | None:
        return self._of(name, lambda found: found.blocked[:1], statistics.median)

    def blocked(self, name: str) -> float | None:
        return self._of(name, lambda found: found.blocked[1:] or found.blocked, statistics.median)

    def durable(self, name: str) -> float | None:
        return self._of(name, lambda found: found.durable[1:] or found.durable, statistics.median)

    def alone(self, name: str) -> float | None:
        return self._of(name, lambda found: found.written, min)

    def slower(self, name: str) -> float | None:
        """Of the steps in which a save is under way, against those of the same turns without."""
        quiet, stepping = (self._of(name, lambda found, key=key: getattr(found, key), statistics.median) for key in STEPS)
        return None if quiet is None or stepping is None else stepping / quiet - 1

    def memory(self, name: str) -> float | None:
        return self._of(name, lambda found: [found.memory], max)

    def load(self, name: str, how: str) -> float | None:
        return self._of(name, lambda found: found.loads[how], min)

    def ways(self, name: str) -> list[str]:
        return list(self._found[name][0].loads)

    def bytes(self, name: str) -> int:
        return self._found[name][0].bytes

    def _of(self, name: str, values: Callable[[Found], list[float]], choose: Callable) -> float | None:
        found = [value for turn in self._found.get(name, []) for value in values(turn)]
        return choose(found) if found else None


def save_rows(figures: Figures) -> Iterator[list[str]]:
    for name in figures.names:
        size, alone, durable = figures.bytes(name), figures.alone(name), figures.durable(name)
        yield [
            name,
            f"{figures.first_blocked(name):.3f}",
            f"{figures.blocked(name):.3f}",
            f"{durable:.2f}",
            f"{alone:.2f}",
            f"{size / alone / 1e9:.2f}",
            ratio(figures.alone(TORCH), alone),
            ratio(figures.alone(TORCH), durable),
            f"{figures.slower(name):.1%}",
            f"{figures.memory(name) / 1e6:.0f}",
        ]


def load_rows(figures: Figures) -> Iterator[list[str]]:
    for name in figures.names:
        for how in figures.ways(name):
            seconds = figures.load(name, how)
            yield [name, how, f"{seconds:.2f}", f"{figures.bytes(name) / seconds / 1e9:.2f}"]


def plan_rows(planned: dict[int, Planned]) -> Iterator[list[str]]:
    for zero, found in planned.items():
        seconds = (found.save, found.load, found.manifest_made, found.manifest_read, found.total)
        cells = [f"{each:.3f}" for each in seconds]
        yield [str(zero), *cells, f"{found.manifest_bytes / 1e6:.2f}", str(found.gathered), str(found.files_opened)]


def goals(figures: Figures, world: int) -> Iterator[str]:
    """Each goal on so many ranks, what was reached, and whether it is met."""
    for what, ours, theirs in (
        ("blocked, first save", figures.first_blocked(OURS), figures.first_blocked(ASYNC)),
        ("blocked, later saves", figures.blocked(OURS), figures.blocked(ASYNC)),
    ):
        yield goal(f"{what} / DCP async_save", over(ours, theirs), lambda x: x <= 1, "at most 1", world)
    reached = over(figures.blocked(DEEPSPEED), figures.blocked(OURS))
    yield goal("blocked, DeepSpeed / ours", reached, lambda x: x >= 6, "at least 6", world)
    for what, seconds in (
        ("waiting, alone", figures.alone(WAITING)),
        ("asynchronous, alone", figures.alone(OURS)),
        ("asynchronous, while training", figures.durable(OURS)),
    ):
        reached = over(figures.alone(TORCH), seconds)
        yield goal(f"durable speed, {what} / torch.save", reached, lambda x: x >= 0.8, "at least 0.8", world)
    yield goal("training slower while it writes", figures.slower(OURS), lambda x: x < 0.05, "under 0.05", world)
    others = [figures.load(name, "load") for name in (ASYNC, DCP, DEEPSPEED)]
    fastest = min((each for each in others if each is not None), default=None)
    for how in ("full", "fast"):
        reached = over(figures.load(OURS, how), fastest)
        what = f"cold load, {how} / fastest of DCP and DeepSpeed"
        yield goal(what, reached, lambda x: x <= 1, "at most 1", world)
    memory = figures.memory(OURS)
    beyond = None if memory is None else (memory - figures.bytes(OURS)) / 1e6
    yield goal("memory beyond the state's size, MB", beyond, lambda x: x <= BUFFER / 1e6, "at most 256", world)


def plan_goals(planned: dict[int, Planned]) -> Iterator[str]:
    for zero, found in planned.items():
        what = f"plans and manifest, ZeRO-{zero}, s"
        yield goal(what, found.total, lambda x: x < 10, "under 10", found.ranks)


def goal(what: str, reached: float | None, met: Callable[[float], bool], wanted: str, ranks: int) -> str:
    if reached is None:
        return f"- {ranks} ranks, {what}: not measured ({wanted})"
    return f"- {ranks} ranks, {what}: {reached:.2f} ({wanted}): {'met' if met(reached) else 'MISSED'}"


def over(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def ratio(a: float | None, b: float | None) -> str:
    return "-" if a is None or b is None else f"{a / b:.2f}"


def print_table(head: Sequence[str], rows: Iterator[list[str]]) -> None:
    print(f"| {' | '.join(head)} |\n|---|{'--:|' * (len(head) - 1)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print(flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where temporary checkpoints are written, default: as tempfile")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2], metavar="RANKS")
    parser.add_argument("--saves", type=int, default=3, help="of each kind")
    parser.add_argument("--loads", type=int, default=2, help="of each kind")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--length", type=int, default=256, help="of the sequence that a rank trains on in a step")
    parser.add_argument("--zero", type=int, default=1, choices=[1, 2, 3])
    parser.add_argument("--quick", action="store_true", help="a small model")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="contenders with one of these in it")
    args = parser.parse_args()
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    print(f"{os.cpu_count()} cores, load averages {load}, Python {platform.python_version()}\n", flush=True)
    results, failed = compete(args)
    all_figures = {world: Figures(results, world) for world in args.worlds}
    save_head = (
        "blocked, first s", "later s", "durable s", "alone s", "GB/s", "x torch.save", "x while training", "slower", "memory MB",
    )  # fmt: skip
    for world, figures in all_figures.items():
        print_table((f"saving, ranks: {world}", *save_head), save_rows(figures))
        print_table((f"loading, ranks: {world}", "how", "s", "GB/s"), load_rows(figures))
    with tempfile.TemporaryDirectory(prefix="checkpoints-", dir=args.folder) as folder:
        model = load_model_config(PLANNED)
        planned = {
            zero: plan(model, SAVED_BY, LOADED_BY, zero=zero, folder=Path(folder) / str(zero)) for zero in (1, 3)
        }
    print(f"{PLANNED.stem}, saved by {SAVED_BY}, loaded by {LOADED_BY}; seconds:\n")
    plan_head = ("save", "load", "manifest", "read", "all", "MB", "gathered, bytes a rank", "files that a rank reads")
    print_table(("planned, ZeRO", *plan_head), plan_rows(planned))
    print(*(line for world, figures in all_figures.items() for line in goals(figures, world)), sep="\n")
    print(*plan_goals(planned), sep="\n")
    print(f"\nLoad averages at the end: {', '.join(f'{each:.1f}' for each in os.getloadavg())}")
    print(*(f"FAILED: {one}" for one in failed), sep="\n", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
