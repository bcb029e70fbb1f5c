"""Raw text -> a shard directory, by any number of processes on any number of nodes, through kills.

The work is cut into units by the inputs alone; each becomes a folder of shards in OUT.partial (units.py), whoever
makes it, and when all are there they are put together in their order (merge.py). So the result is the same bytes
whatever the processes, the nodes and the interruptions were.
"""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from llama_dist.data.claims import Claims
from llama_dist.data.files import is_free
from llama_dist.data.inputs import Input, list_inputs
from llama_dist.data.manifest import MANIFEST, Manifest
from llama_dist.data.merge import MAX_INPUTS, merge, publish, summary
from llama_dist.data.opening import is_url
from llama_dist.data.plan import Plan, begun, contents, differing, identify
from llama_dist.data.progress import SpokenProgress
from llama_dist.data.rows import Reading
from llama_dist.data.shard_writer import PAIR_TOKENS
from llama_dist.data.shards import Shards, load_manifest
from llama_dist.data.skips import SkipLimit, Tally, list_beside
from llama_dist.data.tokenizer import Tokenizer, load_tokenizer
from llama_dist.data.units import MIN_UNIT_BYTES, Job, Unit, finished, unit_size, units_of
from llama_dist.data.words import counted
from llama_dist.data.workers import run_here, run_in_processes, stoppable
from llama_dist.errors import RunError, UserError

MAX_SKIPPED = "0.1%"
LONGEST_WAIT_SECONDS = 5.0
# What tells a process its number among those that were started together, and how many they are.
NODE_NUMBERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("SLURM_NODEID", "SLURM_NNODES"),
)


class Prepared(NamedTuple):
    """What `prepare` has to tell: the manifest of the shards, and whether they were there already."""

    manifest: Manifest
    already_there: bool


class Node(NamedTuple):
    """Which of `count` nodes this is, from 0: with what units it begins. What is left of others' it does in the end."""

    rank: int = 0
    count: int = 1


@dataclass(frozen=True)
class Work:
    """All that `prepare` is to do."""

    job: Job
    inputs: list[Input]
    units: list[Unit]
    plan: Plan
    limit: SkipLimit
    tokenizer: Tokenizer
    node: Node
    workers: int
    out: Path
    command: str


def prepare(
    inputs: Sequence[str | Path],
    tokenizer_path: str | Path,
    out: str | Path,
    *,
    reading: Reading | None = None,
    max_skipped: str = MAX_SKIPPED,
    workers: int | None = None,
    node: Node | None = None,
    pair_tokens: int = PAIR_TOKENS,
    unit_bytes: int | None = None,
    say: Callable[[str], None] | None = None,
    say_every: float = 30.0,
) -> Prepared:
    """Tokenize text into the shard directory `out`; each document is bos, its ids, eos.

    inputs: see `list_inputs`; documents are made of them as `reading` says. `workers` processes do it (default: one a
    core); a few megabytes of text, or one document, are all that one has in memory. `out` appears when it is complete;
    until then the work is in OUT.partial, and the same call goes on with it. Several calls may work on it together,
    on any nodes that share the folder: each returns when `out` is there. `say` gets a line about the progress every
    `say_every` seconds. Where `out` holds the shards of the same inputs and tokenizer already, nothing is done.

    Raises UserError for a bad input or tokenizer, for more documents that cannot be read than `max_skipped` ("20" or
    "0.1%"), and where `out` holds anything else; RunError when it is interrupted by Ctrl-C or SIGTERM.
    """
    reading = reading or Reading()
    if workers is not None and workers < 1:
        raise UserError(f"workers={workers}: at least 1 process is needed; leave it out for one a core")
    node = node or find_node(os.environ)
    if not 0 <= node.rank < node.count:
        raise UserError(f"node_rank={node.rank}, num_nodes={node.count}: nodes are numbered from 0 to num_nodes - 1")
    limit = SkipLimit(max_skipped)
    tokenizer = load_tokenizer(tokenizer_path)
    out = Path(out) if Path(out).name else Path(out).resolve()
    folder = out.with_name(f"{out.name}.partial")
    found = _without_own(list_inputs(inputs), [folder, *[out] * (out / MANIFEST).is_file()], list_beside(out))
    size = unit_bytes or unit_size(found)
    plan = Plan(tokenizer.fingerprint, asdict(reading), size, pair_tokens, identify(found))
    if not is_free(out):
        return Prepared(_finished(out, plan), already_there=True)
    work = Work(
        job=Job(folder, str(tokenizer_path), tokenizer.fingerprint, reading, pair_tokens),
        inputs=found,
        units=units_of(found, size),
        plan=plan,
        limit=limit,
        tokenizer=tokenizer,
        node=node,
        workers=workers or _cores(),
        out=out,
        command=_command(inputs, tokenizer_path, out, reading, max_skipped),
    )
    return _carry_out(work, SpokenProgress(say or (lambda line: None), say_every, work.units))


def find_node(env: Mapping[str, str]) -> Node:
    """This node's number as Open MPI, another MPI or `srun` tells it; without one, the only node.

    It is only about the order of the work: a wrong number costs nothing but a little time.
    """
    for rank, count in NODE_NUMBERS:
        if rank.startswith("SLURM") and "SLURM_STEP_ID" not in env:
            continue  # the batch script itself has these variables too
        numbers = env.get(rank, ""), env.get(count, "")
        if all(number.isdecimal() for number in numbers) and int(numbers[0]) < int(numbers[1]):
            return Node(int(numbers[0]), int(numbers[1]))
    return Node()


def _without_own(inputs: list[Input], folders: list[Path], listed: Path) -> list[Input]:
    """Without what this work itself has written where the folder of its inputs holds its shards, too."""
    own = tuple(os.path.join(os.path.abspath(folder), "") for folder in folders)
    paths = [item.path if is_url(item.path) else os.path.abspath(item.path) for item in inputs]
    return [
        item
        for item, path in zip(inputs, paths, strict=True)
        if not path.startswith(own) and path != os.path.abspath(listed)
    ]


def _cores() -> int:
    """The cores that this process may use: a scheduler may have given it fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _carry_out(work: Work, progress: SpokenProgress) -> Prepared:
    folder = work.job.folder
    try:
        with begun(folder, work.plan) as claims:
            if not is_free(work.out):  # made since it was looked at
                shutil.rmtree(folder)
                return Prepared(_finished(work.out, work.plan), already_there=True)
            return Prepared(_try_to_make(work, claims, progress), already_there=False)
    except FileNotFoundError:
        if folder.exists() or is_free(work.out):
            raise
        return Prepared(_finished(work.out, work.plan), already_there=False)  # another process put it together


def _try_to_make(work: Work, claims: Claims, progress: SpokenProgress) -> Manifest:
    """What stops the work, with what is left of it."""
    try:
        with stoppable():
            return _make(work, claims, progress)
    except KeyboardInterrupt as error:
        name = error.args[0] if error.args else "SIGINT"
        raise RunError(f"prepare: interrupted ({name}){_leave(work, claims)}") from None
    except UserError as error:
        raise UserError(f"{error}{_leave(work, claims)}") from error
    except OSError as error:
        if not work.job.folder.exists():
            raise
        where = error.filename or work.job.folder
        advice = "; make room and call again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise UserError(f"{where}: {error.strerror or error}{advice}{_leave(work, claims)}") from error


def _make(work: Work, claims: Claims, progress: SpokenProgress) -> Manifest:
    folder = work.job.folder
    tally = Tally(folder, work.units, work.limit, list_beside(work.out))
    if not (folder / MANIFEST).exists():
        _do_units(work, claims, tally, progress)
    while not claims.take_folder():
        time.sleep(0.05)  # another process puts it together
    if (folder / MANIFEST).exists():  # a kill came after that
        _finished(folder, work.plan)
    else:
        tally.advance()
        merge(
            folder,
            inputs=work.inputs,
            units=work.units,
            tally=tally,
            plan=work.plan,
            tokenizer=work.tokenizer,
            tokenizer_path=work.job.tokenizer,
            command=work.command,
        )
    manifest = publish(folder, work.out)
    list_beside(work.out).unlink(missing_ok=True)  # of an earlier call, which stopped
    return manifest


def _do_units(work: Work, claims: Claims, tally: Tally, progress: SpokenProgress) -> None:
    """Do all units that nobody else does, and wait for the others: those of a process that dies are done here."""
    mine = sorted(work.units, key=lambda unit: (unit.number - work.node.rank) % work.node.count)
    wait_seconds = 0.05
    progress.each_unit = tally.advance
    while True:
        done = tally.advance()
        progress.finished(done)
        left = [unit for unit in mine if unit.number not in done]
        if not left:
            return
        if claims.shared:
            free = [unit for unit in left if claims.is_free(unit.number)]
        else:
            free = [unit for unit in left if unit.number % work.node.count == work.node.rank]
        count = min(work.workers, len(free))
        if count > 1:
            run_in_processes(free, work.job, count, progress)
        elif free:
            run_here(free, work.job, work.tokenizer, claims, progress)
        else:
            progress.waiting(len(left))
            time.sleep(wait_seconds)
            wait_seconds = min(1.5 * wait_seconds, LONGEST_WAIT_SECONDS)


def _leave(work: Work, claims: Claims) -> str:
    """What is said of the work that is kept. Where none is worth it the folder goes."""
    folder = work.job.folder
    try:
        done = len(finished(folder))
    except FileNotFoundError:
        return ""
    is_little = len(work.units) == 1 and work.units[0].bytes <= MIN_UNIT_BYTES
    if (is_little or not done) and claims.is_alone():
        shutil.rmtree(folder, ignore_errors=True)
        return ""
    units = f"{done:,} of {counted(len(work.units), 'unit')} of the work {'is' if done == 1 else 'are'} done"
    return f"; {units} and kept in {folder}: the same call goes on"


def _finished(out: Path, plan: Plan) -> Manifest:
    """The manifest in `out`, where it is that of the same inputs, read in the same way, and tokenizer."""
    advice = "remove it first, or choose another --out"
    if not (out / MANIFEST).is_file():
        raise UserError(f"{out}: is there and is not a shard directory; {advice}")
    manifest = load_manifest(out)
    if manifest.tokenizer["fingerprint"] != plan.tokenizer:
        raise UserError(f"{out}: holds shards of another tokenizer ({manifest.tokenizer['file']}); {advice}")
    inputs = [summary(plan.inputs)] if len(plan.inputs) > MAX_INPUTS else plan.inputs
    if contents(manifest.inputs) != contents(inputs):
        raise UserError(f"{out}: holds shards of other inputs (made by `{manifest.command}`); {advice}")
    if difference := differing(manifest.reading, plan.reading):
        raise UserError(f"{out}: holds shards of these inputs read in another way: {difference}; {advice}")
    Shards(out).check_sizes()
    return manifest


def _command(
    inputs: Sequence[str | Path], tokenizer: str | Path, out: Path, reading: Reading, max_skipped: str
) -> str:
    """The command line that makes the same shards; processes and nodes are no part of it."""
    words = ["llama-dist", "prepare", *map(str, inputs), "--tokenizer", str(tokenizer), "--out", str(out)]
    usual = Reading()
    mib = 1 << 20
    options = {
        "--text-column": (reading.text, usual.text),
        "--template": (reading.template, usual.template),
        "--id-column": (reading.id, usual.id),
        "--txt": (reading.txt, usual.txt),
        "--max-document-mb": (f"{reading.max_document_bytes / mib:g}", f"{usual.max_document_bytes / mib:g}"),
        "--max-skipped": (max_skipped, MAX_SKIPPED),
    }
    for option, (value, default) in options.items():
        if value != default and value is not None:
            words += [option, value]
    return shlex.join(words)
