"""How fast text becomes shards and shards become batches, beside what others do: two Markdown tables, and the goals.

    python benchmarks/data.py --corpora FOLDER --tokenizer MODEL --peers PEERS/bin/python
    python benchmarks/data.py ... --mb 2 --tokens 2e6 --seconds 0.2 --repeat 1 --only ours bare      a quick look

Tokenising: the corpora in documents of 1 to 3 thousand characters, repeated to --mb of jsonl ("once": each text one
time, so that no word comes back by that), a sentencepiece model. `llama-dist prepare` from the command to finished
shards, there also on four times as much text ("more"), since each worker takes most of a second to start and to meet
the words; Megatron-LM's preprocess_data.py, its loop around megatron-core's tokenizer and writer; datatrove's
DocumentTokenizer with the same model as a tokenizer.json; and sentencepiece alone, on texts in memory, of which nothing
is kept. A worker is a process with one thread, but beside its workers Megatron has a process that writes.

Loaders: sequences of --length from --tokens tokens of shards, shuffled, as int64 tensors. Ours are the micro-batches of
a step, as training asks for them, here or from a thread that reads ahead; others' are samples, one by one (of datasets
eight, which is faster), from what each has made of the same tokens before (not timed). litdata and mosaicml-streaming
shuffle in blocks, the others all of it. Each is tried for --seconds, epoch after epoch. `start-up` is to the first
batch, imports left out; `memory` beyond the imports, with the pages of mapped files.

Each contender runs --repeat times in a process of its own, taking turns; the best counts, and the most memory. On a
machine with other work on it times of the processor say more than times of the clock.

datasets and datatrove are looked for here first (`pip install -e .[test] orjson`), what is not here in the environments
of --peers. mosaicml-streaming wants other versions than datatrove does; the torch of PyPI is gigabytes of CUDA where
there is no wheel for the CPU, and the torchvision that comes along is of no use here and may not fit it:

    python -m venv PEERS
    PEERS/bin/pip install torch==2.13.0 numpy sentencepiece==0.2.3 litdata==0.2.76 mosaicml-streaming==0.13.0 \\
        megatron-core==0.16.1
    PEERS/bin/pip uninstall torchvision

A peer that is nowhere gets a row that says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_peers import ONE_THREAD

HERE = Path(__file__).resolve().parent
SPARSE_TOKENS = 10**12
MORE = 4
PREFIXES = {"": "repeated", "once: ": "once", "more: ": "more"}
OURS = ("-c", "import data_ours; data_ours.main()")
THEIRS = (str(HERE / "data_peers.py"),)
MISSING, FAILED = "not installed", "failed"
Answers = dict[str, list[dict[str, Any]] | str]


@dataclass(frozen=True)
class Contender:
    """A row: a function of data_ours.py or data_peers.py and its arguments; `before` is called once and not timed."""

    label: str
    name: str
    arguments: dict[str, Any]
    ours: bool = False
    before: tuple[str, dict[str, Any]] | None = None


class Processes:
    """Runs contenders, each with the first interpreter that has what it needs."""

    def __init__(self, peers: Sequence[str], folder: Path, *, only: Sequence[str] = ("",)) -> None:
        self._interpreters = [sys.executable, *peers]
        self._only = only
        self._folder = folder
        self.failed = False

    def ours(self, name: str, **arguments: Any) -> dict[str, Any]:
        """Raises RuntimeError where it fails."""
        found = self._call(sys.executable, OURS, name, arguments)
        if isinstance(found, str):
            raise RuntimeError(f"benchmarks/data_ours.py: {name} {found}")
        return found

    def compete(self, contenders: Sequence[Contender], repeat: int) -> Answers:
        """What each contender measured each time, or why it did not, by label."""
        answers: Answers = {}
        for turn in range(repeat):
            for contender in contenders:
                if not any(word in contender.label for word in self._only):
                    continue
                had = answers.setdefault(contender.label, [])
                if isinstance(had, str):
                    continue
                found = self._run(contender, first=turn == 0)
                print(f"{contender.label}: {found}, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
                if isinstance(found, str):
                    answers[contender.label] = found
                else:
                    had.append(found)
        return answers

    def _run(self, contender: Contender, *, first: bool) -> dict[str, Any] | str:
        if contender.ours:
            return self._call(sys.executable, OURS, contender.name, contender.arguments)
        calls = [(contender.name, contender.arguments)]
        if first and contender.before is not None:
            calls.insert(0, contender.before)
        found: dict[str, Any] | str = MISSING
        for name, arguments in calls:
            for interpreter in self._interpreters:
                found = self._call(interpreter, THEIRS, name, arguments)
                if found != MISSING:
                    break
            if isinstance(found, str):
                break
        return found

    def _call(
        self, interpreter: str, script: Sequence[str], name: str, arguments: dict[str, Any]
    ) -> dict[str, Any] | str:
        paths = os.pathsep.join([str(HERE), str(HERE.parent)])
        environment = os.environ | ONE_THREAD | {
            "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": paths
        }  # fmt: skip
        done = subprocess.run(
            [interpreter, *script, name, json.dumps(arguments)],
            cwd=self._folder, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            self.failed = True
            print(f"{name} with {interpreter}:\n{done.stderr}", file=sys.stderr)
            return FAILED
        found = json.loads(done.stdout.splitlines()[-1])
        return MISSING if "missing" in found else found


def tokenising(processes: Processes, args: argparse.Namespace, work: Path) -> tuple[list[str], Answers]:
    """The rows of the first table below its head, and what they are made of."""
    text = processes.ours("make_text", corpora=str(args.corpora), mb=args.mb, more=MORE, out=f"{work}/text")
    model, converted = str(args.tokenizer), f"{work}/tokenizer.json"

    def given(text_name: str, **more: Any) -> dict[str, Any]:
        return {"inputs": text[text_name]["files"], "tokenizer": model} | more

    contenders = [Contender("sentencepiece alone", "raw", given("repeated"))]
    for workers in (1, 2):
        here = {"workers": workers, "out": f"{work}/made"}
        contenders += [
            Contender(f"ours, {workers}", "tokenise", given("repeated", **here), ours=True),
            Contender(f"Megatron, {workers}", "megatron", given("repeated", **here)),
            Contender(
                f"datatrove, {workers}", "datatrove", given("repeated", **here) | {"tokenizer": converted},
                before=("convert", {"tokenizer": model, "out": converted}),
            ),
        ]  # fmt: skip
    here = {"workers": 1, "out": f"{work}/made"}
    contenders += [
        Contender("once: sentencepiece alone", "raw", given("once")),
        Contender("once: ours, 1", "tokenise", given("once", **here), ours=True),
        Contender("once: Megatron, 1", "megatron", given("once", **here)),
    ]
    contenders += [
        Contender(f"more: ours, {workers}", "tokenise", given("more", workers=workers, out=f"{work}/made"), ours=True)
        for workers in (1, 2)
    ]
    answers = processes.compete(contenders, args.repeat)
    rows = []
    for label, found in answers.items():
        prefix = label[: label.find(": ") + 2] if ": " in label else ""
        size = text[PREFIXES[prefix]]["bytes"] / 1e6
        cells = ["-"] * 6
        if isinstance(found, list):
            alone = f"{prefix}sentencepiece alone"
            megatron = f"{prefix}Megatron, {label[-1] if label[-1].isdigit() else 1}"
            cells = [f"{size / _best(answers, label, key):.2f}" for key in ("seconds", "cpu")]
            for other in (megatron, alone):
                cells += [_ratio(_best(answers, other, key), _best(answers, label, key)) for key in ("seconds", "cpu")]
            # The peers but datatrove, to which `<unk>` in a text is a special token, make the very same.
            expected = answers.get(alone)
            if isinstance(expected, list) and "datatrove" not in label:
                assert found[0]["tokens"] == expected[0]["tokens"], f"{label}: other tokens than sentencepiece's"
        rows.append(_row([label, *cells], found))
    return rows, answers


def loaders(processes: Processes, args: argparse.Namespace, work: Path) -> tuple[list[str], Answers]:
    """The rows of the second table below its head, and what they are made of."""
    model, shards = str(args.tokenizer), f"{work}/shards"
    processes.ours("make_shards", tokens=int(args.tokens), tokenizer=model, out=shards)
    made = {"pair": f"{shards}/00000", "length": args.length}
    given = made | {"seconds": args.seconds}
    theirs, here = given | {"work": str(work)}, made | {"work": str(work)}
    contenders = [
        Contender("bare memory map", "bare", theirs),
        Contender("ours", "load", given | {"tokenizer": model, "prefetch": 0}, ours=True),
        Contender("ours, read ahead", "load", given | {"tokenizer": model, "prefetch": 2}, ours=True),
        Contender("Megatron GPTDataset", "gpt_dataset", theirs),
        Contender("datasets", "datasets", theirs, before=("write_datasets", here)),
        Contender("litdata", "litdata", theirs, before=("write_litdata", here)),
        Contender("mosaicml-streaming", "streaming", theirs, before=("write_streaming", here)),
    ]
    answers = processes.compete(contenders, args.repeat)
    rows = []
    for label, found in answers.items():
        cells = ["-"] * 8
        if isinstance(found, list):
            rate, cpu_rate = _most(answers, label, "rate"), _most(answers, label, "cpu_rate")
            cells = [
                f"{rate / 1e6:.1f}",
                f"{cpu_rate / 1e6:.1f}",
                _ratio(rate, _most(answers, "bare memory map", "rate")),
                _ratio(cpu_rate, _most(answers, "bare memory map", "cpu_rate")),
                _ratio(cpu_rate, _most(answers, "Megatron GPTDataset", "cpu_rate")),
                f"{1e3 * _best(answers, label, 'startup'):.1f}",
                f"{1e3 * _best(answers, label, 'seek'):.1f}" if "seek" in found[0] else "-",
                f"{_most(answers, label, 'memory') / 2**20:.0f}",
            ]
        rows.append(_row([label, *cells], found))
    return rows, answers


def sparse(processes: Processes, args: argparse.Namespace, work: Path) -> dict[str, float]:
    """What a step in the middle of a trillion tokens takes, files sparse: milliseconds and MiB, of the best try."""
    shards = {"tokenizer": str(args.tokenizer)}
    processes.ours("make_sparse_shards", tokens=SPARSE_TOKENS, out=f"{work}/sparse", **shards)
    tries = [
        processes.ours("seek", shards=f"{work}/sparse", length=args.length, **shards) for _ in range(args.repeat)
    ]
    found = {key: 1e3 * min(each[key] for each in tries) for key in ("open", "seek", "again")}
    return found | {"memory": max(each["memory"] for each in tries) / 2**20}


def goals(text: Answers, tokens: Answers, far: dict[str, float]) -> Iterator[str]:
    """Each goal, what was reached, and whether it is met; by time of the processor where that is fairer."""

    def line(what: str, reached: float | None, met: Callable[[float], bool], goal: str) -> str:
        if reached is None:
            return f"- {what}: not measured ({goal})"
        return f"- {what}: {reached:.2f} ({goal}): {'met' if met(reached) else 'MISSED'}"

    def over(answers: Answers, label: str, other: str, key: str, *, best: Any) -> float | None:
        ours, theirs = best(answers, label, key), best(answers, other, key)
        return None if ours is None or theirs is None else (theirs / ours if best is _best else ours / theirs)

    for workers in (1, 2):
        for key in ("seconds", "cpu"):
            reached = over(text, f"ours, {workers}", f"Megatron, {workers}", key, best=_best)
            yield line(f"prepare / Megatron, workers {workers}, by {key}", reached, lambda x: x >= 2, "at least 2")
    for prefix in ("", "once: "):
        for key in ("seconds", "cpu"):
            reached = over(text, f"{prefix}ours, 1", f"{prefix}sentencepiece alone", key, best=_best)
            yield line(f"{prefix}prepare / sentencepiece, by {key}", reached, lambda x: x >= 1.5, "at least 1.5")
    reached = over(text, "more: ours, 2", "more: ours, 1", "seconds", best=_best)
    yield line("more: 2 workers / 1, by seconds", reached, lambda x: x >= 1.8, "near 2")
    for other, goal in (("Megatron GPTDataset", 5.0), ("litdata", 1.0), ("bare memory map", 0.6)):
        for key in ("rate", "cpu_rate"):
            reached = over(tokens, "ours", other, key, best=_most)
            yield line(f"loader / {other}, by {key}", reached, lambda x, goal=goal: x >= goal, f"at least {goal:g}")
    for key, what in (("startup", "start-up"), ("seek", "seek")):
        found = _best(tokens, "ours", key)
        yield line(f"{what}, ms", None if found is None else 1e3 * found, lambda x: x < 20, "under 20")
    found = _most(tokens, "ours", "memory")
    yield line("memory, MiB", None if found is None else found / 2**20, lambda x: x < 200, "under 200")
    yield line("a trillion tokens: open and seek, ms", far["open"] + far["seek"], lambda x: x < 50, "under 50")
    yield line("a trillion tokens: memory, MiB", far["memory"], lambda x: x < 50, "under 50")


def _best(answers: Answers, label: str, key: str) -> float | None:
    found = answers.get(label)
    return min(each[key] for each in found) if isinstance(found, list) else None


def _most(answers: Answers, label: str, key: str) -> float | None:
    found = answers.get(label)
    return max(each[key] for each in found) if isinstance(found, list) else None


def _ratio(a: float | None, b: float | None) -> str:
    return "-" if a is None or b is None else f"{a / b:.2f}"


def _row(cells: list[str], found: list[dict[str, Any]] | str) -> str:
    if isinstance(found, str):
        cells[1] = found
    return f"| {' | '.join(cells)} |"


def _head(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n|---|{'--:|' * (len(cells) - 1)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, required=True, metavar="FOLDER", help="of text, in any form")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="MODEL", help="a sentencepiece model")
    parser.add_argument("--peers", action="append", default=[], metavar="PYTHON", help="of an environment of peers")
    parser.add_argument("--mb", type=float, default=50, help="of text to tokenise")
    parser.add_argument("--tokens", type=float, default=200e6, help="to load from")
    parser.add_argument("--length", type=int, default=2048, help="of a sequence")
    parser.add_argument("--seconds", type=float, default=5, help="that each loader is tried")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="rows with one of these in their name")
    args = parser.parse_args()
    args.corpora, args.tokenizer = args.corpora.resolve(), args.tokenizer.resolve()
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    print(f"{os.cpu_count()} cores, load averages {load}, Python {platform.python_version()}\n")
    with tempfile.TemporaryDirectory(prefix="llama-dist-benchmark-") as name:
        processes = Processes(args.peers, Path(name), only=args.only)
        rows, text = tokenising(processes, args, Path(name))
        by = ("Megatron, clock", "Megatron, CPU", "sentencepiece, clock", "sentencepiece, CPU")
        print(_head("tokenising, workers", "MB/s", "MB/CPU s", *(f"x {each}" for each in by)), *rows, "", sep="\n")
        rows, tokens = loaders(processes, args, Path(name))
        by = ("bare, clock", "bare, CPU", "GPTDataset, CPU")
        head = ("loader", "Mtok/s", "Mtok/CPU s", *(f"x {each}" for each in by), "start-up ms", "seek ms", "memory MiB")
        print(_head(*head), *rows, "", sep="\n", flush=True)
        far = sparse(processes, args, Path(name))
    print(
        f"A trillion tokens of sparse files: open {far['open']:.1f} ms, a step in the middle {far['seek']:.1f} ms, "
        f"another {far['again']:.1f} ms, memory {far['memory']:.1f} MiB.\n"
    )
    print(*goals(text, tokens, far), sep="\n")
    print(f"\nLoad averages at the end: {', '.join(f'{each:.1f}' for each in os.getloadavg())}")
    return int(processes.failed)


if __name__ == "__main__":
    sys.exit(main())
