"""From a config and a launcher's environment to a finished run: opens everything, trains, closes everything."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from rich.markup import escape

from llama_dist import __version__
from llama_dist.checkpoint.local_level import LocalLevel
from llama_dist.checkpoint.store import Position
from llama_dist.config import RunConfig, dump_config, fit_layout, micro_batch_of
from llama_dist.data.history import History, Pace, changes_ahead, switch_between
from llama_dist.data.loader import Loader
from llama_dist.data.packing import find_packing_damage
from llama_dist.data.prefetch import Prefetching
from llama_dist.data.remote import is_url
from llama_dist.data.shards import MANIFEST, Shards, find_damage
from llama_dist.data.spool import jobs_of, spooling
from llama_dist.data.spool_writer import SpoolJob
from llama_dist.data.stream import STREAMS, Spools, spool_of
from llama_dist.data.tokenizer import fingerprint_of
from llama_dist.errors import RunError, UserError
from llama_dist.eval.scoring import Replica
from llama_dist.files import write_file
from llama_dist.layout import Layout
from llama_dist.model.cuts import flops_per_token, num_parameters
from llama_dist.pipeline.engine import build_monitor
from llama_dist.pipeline.runner import build_runner
from llama_dist.pipeline.schedule import PipelineShape, schedule_words
from llama_dist.runtime import Runtime, gather_texts, is_lost_contact, pick_device, read_environment, start_runtime, stop_runtime
from llama_dist.train.coordinator import Coordinator
from llama_dist.train.evaluation import Evaluation
from llama_dist.train.finding import find_newest, open_local_level
from llama_dist.train.holding import holding
from llama_dist.train.ledger import Ledger, open_ledger
from llama_dist.train.loop import train
from llama_dist.train.metrics import StepLog, duration, peak_tflops, quantity
from llama_dist.train.resume import check_same_run, history_of
from llama_dist.train.signals import StopRequest, stop_request

log = logging.getLogger("llama_dist")

PATIENCE = 0.8  # of the time that ranks wait for each other: what a stream lacks is said before they give up
EXIT_DONE = 0
EXIT_LOST = EXIT_UNSAVED = 1  # another rank died or fell silent; the last save failed
EXIT_STOPPED = 75  # asked to stop, saved, not finished: launchers start the run again on this status


def run_training(run: RunConfig) -> int:
    """Train `run` on this rank of whatever launcher started it; returns the process's exit status.

    Raises UserError, before any process group is made, where config, layout, files and machine do not go together, and
    RunError where the ranks do not meet.
    """
    environment = read_environment()
    layout = fit_layout(run, environment.world_size)
    device = pick_device(environment, run.train.device)
    coord = layout.coord(environment.rank)
    loader = Loader(
        run.data,
        vocab_size=run.model.vocab_size,
        global_batch=run.train.global_batch,
        micro_batch=micro_batch_of(run, layout),
        dp=layout.dp,
        dp_rank=coord.dp,
        pin=device.type == "cuda",
        spools=Spools(Path(run.folder) / STREAMS, wait_seconds=PATIENCE * run.train.timeout_seconds),
    )
    evaluation = Evaluation(run)
    check_sizes(run)
    try:
        start_log(Path(run.folder), environment.rank)
    except (OSError, ValueError) as error:
        raise UserError(f"folder={run.folder}: cannot be written to: {error}; name another run folder") from error
    try:
        runtime = start_runtime(
            environment,
            layout,
            device=device,
            timeout_seconds=run.train.timeout_seconds,
            kv_heads=run.model.num_key_value_heads,
        )
        with stop_request() as request, holding(Path(run.folder), group=runtime.groups.control):
            return _resume_or_start(run, runtime, loader, evaluation, request)
    except (UserError, RunError) as error:
        log.error("%s", error)
        raise
    except Exception as error:
        # The log file has the whole story of each rank; a launcher mixes the ranks' stderr into one stream.
        who = f"rank {environment.rank} {coord}"
        log.exception("%s failed", who)
        if not is_lost_contact(error):
            print(f"llama-dist train: {who} failed: {error!r}", file=sys.stderr)
            raise
        reason = str(error).splitlines()[0]
        print(
            f"llama-dist train: {who} has no contact with another rank, whose log in {run.folder}/logs may say why: "
            f"{reason}",
            file=sys.stderr,
        )
        return EXIT_LOST
    finally:
        stop_runtime()


def start_log(folder: Path, rank: int) -> None:
    """Send this rank's log, and all that a rank but the first prints, to `logs/rank-NNNNN.log` in the run folder."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    path = folder / "logs" / f"rank-{rank:05d}.log"
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    log.setLevel(logging.INFO)
    logging.captureWarnings(True)
    # DeepSpeed's calls of torch names that have newer ones: nothing that a user could act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.raiseExceptions = False  # a log that cannot be written is not worth a traceback for every line
    if rank > 0:
        # Libraries print from every rank; a reader wants each line once. Errors still reach the launcher's stderr.
        sys.stdout.flush()
        with open(path, "a") as file:
            os.dup2(file.fileno(), sys.stdout.fileno())


def _resume_or_start(
    run: RunConfig, runtime: Runtime, loader: Loader, evaluation: Evaluation, request: StopRequest
) -> int:
    """Find the newest checkpoint that verifies, and train on from it; without any, from the start."""
    check_shards(run, runtime)
    level = open_local_level(run, runtime.groups)
    found = find_newest(run, level, group=runtime.groups.control)
    checkpoint = found.checkpoint
    position, then = Position(), None
    if checkpoint is not None:
        check_same_run(checkpoint, run)
        position, then = checkpoint.position, history_of(checkpoint, run)
    history = loader.begin(then, step=position.step, samples=position.samples, steps=run.train.steps)
    if position.step >= run.train.steps:
        if runtime.is_coordinator:
            step, steps = position.step, run.train.steps
            print(f"{run.folder}: the run is finished: it stands at step {step}, and train.steps is {steps}")
        return EXIT_DONE
    with spooling(_spool_jobs(run, runtime)):
        # From here on this start holds the run: an earlier one that still lives stops at its next step.
        try:
            ledger, attempt = _open_folder(run, runtime)
            steps_log = _open_steps_log(run, runtime, attempt) if ledger else None
        except OSError as error:
            raise UserError(f"folder={run.folder}: cannot be written to: {error}; mend it or name another") from error
        coordinator = _build(run, runtime, history, evaluation, request, ledger, attempt, steps_log, level)
        for problem in found.passed_over:
            coordinator.tell(f"[red]checkpoint passed over:[/] {problem}", "checkpoint_passed_over", problem=problem)
        started_at = time.perf_counter()
        begun = coordinator.restore(found)
        _tell_mixture(run, coordinator, then, begun)
        until = begun.samples + (run.train.steps - begun.step) * run.train.global_batch
        with Prefetching(loader, steps=run.data.prefetch, until=until) as steps_ahead:
            position = train(
                run,
                engine=coordinator.engine,
                runner=coordinator.runner,
                loader=steps_ahead,
                coordinator=coordinator,
                position=begun,
            )
        return _finish(run, coordinator, begun, position, time.perf_counter() - started_at)


def _spool_jobs(run: RunConfig, runtime: Runtime) -> list[SpoolJob]:
    """What this rank has its streams tokenised by: the coordinator does it for all."""
    if not runtime.is_coordinator:
        return []
    folder, fingerprint = Path(run.folder), fingerprint_of(run.data.tokenizer)
    return jobs_of(run.data, fingerprint=fingerprint, folder=folder / STREAMS, logs=folder / "logs")


def _tell_mixture(run: RunConfig, coordinator: Coordinator, then: History | None, begun: Position) -> None:
    """Record what the run will read from here on, and say where that is another mixture than it would have been."""
    history, now = coordinator.history, Pace(begun.step, begun.samples, run.train.global_batch)
    switch = switch_between(then, history, begun.samples) if then else None
    if switch:
        coordinator.tell(f"[yellow]another mixture[/] {escape(switch)}", "switch", step=begun.step, mixture=switch)
    for change in changes_ahead(history, now, run.train.steps):
        coordinator.tell(f"mixture {escape(change)}")
    if coordinator.ledger:
        coordinator.ledger.write("data", step=begun.step, samples=begun.samples, history=history.to_json())


def check_sizes(run: RunConfig) -> None:
    """Raise UserError where a shard file on this machine is missing or cut short: shards open lazily, runs do not."""
    paths = [source.shards for source in run.data.train if source.shards]
    for path in paths + ([run.data.heldout] if run.data.heldout else []):
        if not is_url(path):
            Shards(path).check_sizes()


def check_shards(run: RunConfig, runtime: Runtime) -> None:
    """Raise UserError on all ranks, naming the files, when shards are not what their manifests say. Collective."""
    if not run.data.verify:
        return
    paths = [path for path in shard_paths(run) if path] + ([run.data.heldout] if run.data.heldout else [])
    rank, world = runtime.rank, runtime.layout.world
    problems = [problem for path in paths for problem in find_damage(path, part=rank, parts=world)]
    if run.data.packing == "best_fit":
        for source in run.data.train:
            problems += find_packing_damage(source.shards, run.data.seq_len, part=rank, parts=world)
    problems = gather_texts(problems, group=runtime.groups.control)
    if problems:
        raise UserError("; ".join(problems) + "; copy or make the shards again (data.verify=false takes them as they are)")


def _build(
    run: RunConfig,
    runtime: Runtime,
    history: History,
    evaluation: Evaluation,
    request: StopRequest,
    ledger: Ledger | None,
    attempt: int,
    steps_log: StepLog | None,
    local: LocalLevel | None = None,
) -> Coordinator:
    """The stage, its engine and runner, and the coordinator that holds them. Collective."""
    layout, coord = runtime.layout, runtime.coord
    dtype = precision_of(run, runtime.device)
    if steps_log:
        steps_log.say(_heading(run, runtime, dtype))
    runner = build_runner(run, runtime, dtype=dtype)
    return Coordinator(
        run=run,
        runtime=runtime,
        engine=runner.engine,
        runner=runner,
        evaluation=evaluation,
        replica=Replica(
            group=runtime.groups.control,
            dp=layout.dp,
            dp_rank=coord.dp,
            reports=coord.tp == coord.cp == 0 and coord.pp == layout.pp - 1,
        ),
        request=request,
        attempt=attempt,
        history=history,
        tokenizer_fingerprint=evaluation.tokenizer.fingerprint,
        ledger=ledger,
        steps_log=steps_log,
        local=local,
    )


def precision_of(run: RunConfig, device: torch.device) -> torch.dtype:
    """The type that forward and backward compute in; weights and moments are kept in float32 whatever it is."""
    auto = "bf16" if device.type == "cuda" else "fp32"
    wanted = auto if run.train.precision == "auto" else run.train.precision
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[wanted]


def _open_folder(run: RunConfig, runtime: Runtime) -> tuple[Ledger | None, int]:
    """Take the next attempt number on the coordinator and tell it to all. Collective."""
    box: list[int | None] = [None]
    ledger = None
    if runtime.is_coordinator:
        folder = Path(run.folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "config.yaml", dump_config(run).encode())
        versions = {"llama_dist": __version__, "torch": torch.__version__, "python": sys.version.split()[0]}
        ledger = open_ledger(folder, config=run.model_dump(mode="json"), versions=versions)
        ledger.write(
            "start",
            launcher=runtime.environment.launcher,
            layout=asdict(runtime.layout),
            zero=run.parallel.zero,
            device=str(runtime.device),
        )
        box = [ledger.attempt]
    dist.broadcast_object_list(box, src=0, group=runtime.groups.control)
    return ledger, box[0]


def _open_steps_log(run: RunConfig, runtime: Runtime, attempt: int) -> StepLog:
    peak = peak_tflops(runtime.device, precision_of(run, runtime.device), configured=run.metrics.peak_tflops)
    return StepLog(
        Path(run.folder),
        steps=run.train.steps,
        tokens_per_step=run.train.global_batch * run.data.seq_len,
        flops_per_token=flops_per_token(run.model, run.data.seq_len),
        peak_flops=peak * 1e12 * runtime.layout.world,
        device=runtime.device,
        monitor=build_monitor(Path(run.folder), runtime, enabled=run.metrics.tensorboard),
        attempt=attempt,
    )


def _heading(run: RunConfig, runtime: Runtime, dtype: torch.dtype) -> str:
    layout, precision = runtime.layout, str(dtype).removeprefix("torch.")
    tokens = run.train.steps * run.train.global_batch * run.data.seq_len
    return (
        f"[bold]{run.name}[/]: {quantity(num_parameters(run.model))} parameters on {layout.world} x "
        f"{runtime.device.type} ({precision}), started by {runtime.environment.launcher}; {_layout_words(run, layout)}\n"
        f"{run.train.steps} steps of {run.train.global_batch} sequences of "
        f"{run.data.seq_len} tokens ({quantity(tokens)} in all), {micro_batch_of(run, layout)} at a time on a replica"
    )


def _layout_words(run: RunConfig, layout: Layout) -> str:
    parallel = run.parallel
    words = [f"dp {layout.dp}", f"tp {layout.tp}", f"pp {layout.pp}"]
    if layout.cp > 1:
        words.append(f"cp {layout.cp}")
    if layout.tp > 1 and parallel.sequence_parallel:
        words.append("sequence parallel")
    words += schedule_words(parallel.schedule, PipelineShape(layout.pp, 1, parallel.virtual_stages))
    kept = " (gathered for a step)" if parallel.zero == 3 and parallel.gather == "step" else ""
    return ", ".join([*words, f"ZeRO-{parallel.zero}{kept}", f"activation checkpointing {parallel.activation_checkpointing}"])


def _finish(run: RunConfig, coordinator: Coordinator, begun: Position, position: Position, seconds: float) -> int:
    """Say how the run ended and where everything lies."""
    saved = coordinator.saves.saved_at == position.step
    finished = position.step >= run.train.steps
    trained = quantity((position.samples - begun.samples) * run.data.seq_len)
    if not saved:
        coordinator.tell(
            f"[red]the last save failed; the newest checkpoint is that of step {max(coordinator.saves.saved_at, 0)}[/]",
            "ended_unsaved",
            step=position.step,
            saved_at=coordinator.saves.saved_at,
        )
    elif finished:
        since = " since it was resumed" if begun.step else ""
        text = f"[bold]finished[/]: {trained} tokens in {duration(seconds)}{since}"
        coordinator.tell(text, "finish", step=position.step)
    else:
        name = coordinator.request.signal.name if coordinator.request.signal else "another rank's request"
        coordinator.tell(
            f"[bold]stopped[/] by {name} at step {position.step} of {run.train.steps}; the same command goes on",
            "stop",
            step=position.step,
        )
    entropy = unigram_entropy(run)
    if finished and entropy is not None and "heldout" in coordinator.last_results:
        loss = coordinator.last_results["heldout"]["loss"]
        coordinator.tell(
            f"held-out loss {loss:.3f} nats/token; a model that knows only token frequencies has {entropy:.3f} "
            "at best (the unigram entropy of the held-out text)"
        )
    coordinator.tell(
        f"run folder: {run.folder} "
        f"(config.yaml, metrics.jsonl, ledger.jsonl, checkpoints/, evals/, logs/, tensorboard/)"
    )
    if not saved:
        return EXIT_UNSAVED
    return EXIT_DONE if finished else EXIT_STOPPED


def unigram_entropy(run: RunConfig) -> float | None:
    """Nats per held-out token of a model that knows only how often each occurs there: what a real one must beat."""
    manifest = Shards(run.data.heldout).manifest if run.data.heldout else None
    return None if manifest is None else manifest.unigram_entropy


def shard_paths(run: RunConfig) -> list[str | None]:
    """Where the shards of each source lie, those of a stream being its spool; None: it has none yet."""
    paths: list[str | None] = []
    for source in run.data.train:
        if source.stream is None:
            paths.append(source.shards)
        else:
            spool = spool_of(source.stream, fingerprint_of(run.data.tokenizer), Path(run.folder) / STREAMS)
            paths.append(str(spool) if (spool / MANIFEST).is_file() else None)
    return paths
