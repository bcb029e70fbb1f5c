"""What happens between the steps: restore, decide, save, evaluate, log. Rank 0 writes; every rank decides alike."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.text import Text
from torch import Tensor

from llama_dist import __version__
from llama_dist.checkpoint.dcp import NotFiniteError
from llama_dist.checkpoint.pieces import Piece, pieces_of_shares
from llama_dist.checkpoint.store import (
    Checkpoint,
    Position,
    SaveError,
    clean_leftovers,
    list_committed,
    load_pieces,
    prune,
    save_checkpoint,
)
from llama_dist.config import RunConfig
from llama_dist.data.history import History
from llama_dist.errors import RunError
from llama_dist.eval.scoring import Replica
from llama_dist.files import write_file
from llama_dist.model.init import draw_box
from llama_dist.pipeline.engine import StageEngine
from llama_dist.pipeline.runner import PipelineRunner
from llama_dist.runtime import Runtime, all_reduce_sum
from llama_dist.train.evaluation import Evaluation, Results, describe
from llama_dist.train.ledger import Ledger
from llama_dist.train.metrics import StepLog
from llama_dist.train.resume import changed_settings
from llama_dist.train.signals import StopRequest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decision:
    """What all ranks do after a step, and the step's loss."""

    loss: float
    save: bool = False
    evaluate: bool = False
    stop: bool = False


@dataclass
class Coordinator:
    """Holds what the loop needs between steps. `ledger` and `steps_log` are there on the coordinator rank only."""

    run: RunConfig
    runtime: Runtime
    engine: StageEngine
    runner: PipelineRunner
    evaluation: Evaluation
    replica: Replica
    request: StopRequest
    attempt: int
    history: History
    tokenizer_fingerprint: str
    ledger: Ledger | None = None
    steps_log: StepLog | None = None
    last_results: Results = field(default_factory=dict)
    saved_at: int = -1
    damaged: list[Path] = field(default_factory=list)  # committed folders that were passed over at the start

    @property
    def folder(self) -> Path:
        return Path(self.run.folder)

    def pieces(self) -> list[Piece]:
        """This rank's part of the state as boxes of logical tensors, as views."""
        return pieces_of_shares(self.engine.shares(), self.engine.stage.slices)

    def restore(self, checkpoint: Checkpoint | None) -> Position:
        """Continue from a checkpoint that verified, or draw the initial weights. Collective."""
        if self.ledger:
            for problem in clean_leftovers(self.folder / "checkpoints"):
                self.tell(f"[red]{escape(problem)}[/]", "leftover", reason=problem)
            newer = list_committed(self.folder / "checkpoints")
            # Whatever is newer than the newest that verifies does not verify.
            self.damaged = newer[: newer.index(checkpoint.path)] if checkpoint else newer
        if checkpoint is None:
            self._draw_weights()
            self.engine.refresh()
            return Position()
        read = load_pieces(checkpoint, self.pieces(), group=self.runtime.groups.control)
        self.engine.set_step(checkpoint.position.step)
        self.engine.refresh()
        self.saved_at = checkpoint.position.step
        step, changed = checkpoint.position.step, changed_settings(checkpoint, self.run)
        self.tell(
            f"resumed from {escape(str(checkpoint.path))}", "resume", step=step, bytes_read=read, changed=changed
        )
        for change in changed:
            if change.startswith("data.train:"):
                continue  # what that means for the data is told by itself
            self.tell(f"[yellow]changed since then:[/] {escape(change)}")
        return checkpoint.position

    def _draw_weights(self) -> None:
        for piece in self.pieces():
            if piece.name in self.engine.shapes:  # the others are moments, which begin as zeros
                drawn = draw_box(
                    piece.name, piece.shape, piece.box, seed=self.run.train.seed, config=self.run.model
                )
                piece.data.copy_(drawn)

    def decide(self, position: Position, loss_part: Tensor, grad_norm: float) -> Decision:
        """The one control collective of a step: what any rank knows, all ranks act on.

        `position` is that after the step, `loss_part` this rank's part of the step's loss. Raises RunError when the
        loss or the gradient norm is no number (the state is worth nothing and is not saved), or when another start
        has taken the run over.
        """
        successor = self.ledger.successor() if self.ledger else None
        known = [self.request.signal is not None, not math.isfinite(grad_norm), successor is not None]
        loss, asked, odd, fenced = all_reduce_sum(
            [float(loss_part), *map(float, known)], group=self.runtime.groups.control
        )
        if fenced:
            raise RunError(f"{self.folder}: {successor or 'a later attempt'} has taken over; this one stops unsaved")
        if odd or not math.isfinite(loss):
            raise RunError(self._diverged(position, f"loss {loss}, gradient norm {grad_norm}"))
        ended = position.step >= self.run.train.steps
        save_every, eval_every = self.run.checkpoint.every, self.run.eval.every
        return Decision(
            loss=loss,
            save=bool(ended or asked or (save_every and position.step % save_every == 0)),
            # Whoever asks to stop does not wait for an evaluation.
            evaluate=bool(ended or (not asked and eval_every and position.step % eval_every == 0)),
            stop=bool(asked),
        )

    def _diverged(self, position: Position, what: str) -> str:
        first = position.samples - self.run.train.global_batch
        text = (
            f"step {position.step}: {what}, on samples {first} to {position.samples - 1} of the run; the state is not saved, the newest checkpoint is that of step "
            f"{max(self.saved_at, 0)}; lower optim.lr, or look at the data of that step"
        )
        if self.ledger:
            self.ledger.write("diverged", step=position.step, samples=[first, position.samples], reason=text)
        return text

    def start_clock(self) -> None:
        """Time the steps from here."""
        if self.steps_log:
            self.steps_log.start_clock()

    def record(self, position: Position, *, loss: float, grad_norm: float, lr: float) -> None:
        """Log a finished step, on the coordinator rank."""
        if self.steps_log:
            self.steps_log.record(
                step=position.step, samples=position.samples, loss=loss, grad_norm=grad_norm, lr=lr
            )

    def save(self, position: Position) -> None:
        """Save and prune. Collective. A save that fails is loud and the run goes on with the checkpoints before.

        Raises RunError when the step's update has diverged.
        """
        checkpoints = self.folder / "checkpoints"
        try:
            path = save_checkpoint(
                checkpoints,
                position,
                [piece for piece in self.pieces() if piece.owner],
                state=self._state(),
                attempt=self.attempt,
                group=self.runtime.groups.control,
            )
        except NotFiniteError as error:
            raise RunError(self._diverged(position, str(error))) from error
        except SaveError as error:
            self.tell(f"[red]{escape(str(error))}[/]", "save_failed", step=position.step, reason=str(error))
            return
        self.saved_at = position.step
        self.tell(f"[dim]saved {escape(str(path))}[/]", "save", step=position.step)
        if self.ledger:
            self._prune(path)
        self.start_clock()

    def _prune(self, saved: Path) -> None:
        self.damaged = [path for path in self.damaged if path != saved]  # the new one took its place
        try:
            pruned = prune(saved.parent, keep=self.run.checkpoint.keep, damaged=self.damaged)
        except OSError as error:
            self.tell(f"[red]old checkpoints stay: {escape(str(error))}[/]", "prune_failed", reason=str(error))
            return
        if pruned:
            self.ledger.write("prune", pruned=[path.name for path in pruned])

    def _state(self) -> dict[str, Any]:
        """What a checkpoint says of the run beside its tensors. All randomness is a function of the seeds here."""
        return {
            "layout": asdict(self.runtime.layout) | {"zero": self.run.parallel.zero},
            "data": self.history.to_json(),
            "tokenizer": self.tokenizer_fingerprint,
            "config": self.run.model_dump(mode="json"),
            "versions": {"llama_dist": __version__, "torch": torch.__version__},
        }

    def evaluate(self, position: Position) -> None:
        """Run the configured tasks on all ranks; the coordinator logs and keeps the results. Collective."""
        if self.steps_log:
            self.steps_log.reassure("evaluating ...")
        self.last_results = self.evaluation(self.runner, replica=self.replica)
        self._keep_results(position)
        self.start_clock()

    def _keep_results(self, position: Position) -> None:
        if not self.ledger or not self.last_results:
            return
        body = {"step": position.step, "samples": position.samples, "results": self.last_results}
        name = f"step-{position.step:08d}.json"
        try:
            (self.folder / "evals").mkdir(exist_ok=True)
            write_file(self.folder / "evals" / name, json.dumps(body, indent=1).encode())
        except OSError as error:  # the results still go to console, ledger and metrics
            self.tell(f"[red]{escape(str(error))}[/]", "results_not_kept", step=position.step, reason=str(error))
        for task, result in self.last_results.items():
            self.tell(f"[cyan]eval[/] {describe(task, result)}", "eval", step=position.step, task=task, **result)
            numbers = {f"eval/{Path(task).stem}/{key}": value for key, value in result.items()}
            self.steps_log.write(step=position.step, samples=position.samples, **numbers)

    def tell(self, text: str, event: str | None = None, **fields: Any) -> None:
        """Say a line to the reader, on the coordinator rank, and write an event into the ledger where one is named."""
        log.info("%s", Text.from_markup(text).plain)
        if self.ledger:
            self.steps_log.say(text)
            if event:
                self.ledger.write(event, **fields)
