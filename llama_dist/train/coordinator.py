"""What happens between the steps: restore, decide, save, evaluate, log. Rank 0 writes; every rank decides alike."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.text import Text
from torch import Tensor

from llama_dist import __version__
from llama_dist.checkpoint.local_level import LocalLevel, Spread
from llama_dist.checkpoint.pieces import Piece, check_shares, pieces_of_shares
from llama_dist.checkpoint.plan import SavedLayout, split_name
from llama_dist.checkpoint.store import Checkpoint, Position, load_pieces
from llama_dist.config import RunConfig
from llama_dist.data.history import History
from llama_dist.errors import RunError, UserError
from llama_dist.eval.scoring import Replica
from llama_dist.files import write_file
from llama_dist.model.init import draw_box
from llama_dist.model.stages import stage_layers
from llama_dist.pipeline.engine import StageEngine
from llama_dist.pipeline.runner import PipelineRunner
from llama_dist.runtime import Runtime, all_reduce_sum, gather_texts
from llama_dist.train.evaluation import Evaluation, Results, describe
from llama_dist.train.finding import Found
from llama_dist.train.ledger import Ledger
from llama_dist.train.metrics import StepLog
from llama_dist.train.resume import changed_settings
from llama_dist.train.saves import EVALS, Saves, build_saves, place_of
from llama_dist.train.signals import StopRequest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decision:
    """What all ranks do after a step, and the step's loss."""

    loss: float
    save: bool = False
    save_local: bool = False
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
    local: LocalLevel | None = None
    saves: Saves | None = None  # there once the run stands at a position

    @property
    def folder(self) -> Path:
        return Path(self.run.folder)

    def pieces(self) -> list[Piece]:
        """This rank's part of the state as boxes of logical tensors, as views."""
        return pieces_of_shares(self.engine.shares(), self.engine.stage.slices)

    @cached_property
    def saved_layout(self) -> SavedLayout:
        """How this run's checkpoints are spread over its ranks' files."""
        parallel, pp = self.run.parallel, self.runtime.layout.pp
        layers = stage_layers(
            self.run.model,
            stages=pp * parallel.virtual_stages,
            seq_len=self.run.data.seq_len,
            given=parallel.stage_layers,
        )
        return SavedLayout(self.run.model, self.runtime.layout, parallel.zero, tuple(layers))

    def restore(self, found: Found) -> Position:
        """Continue from a checkpoint that verified, or draw the initial weights. Collective."""
        checkpoint = found.checkpoint
        check_shares(self.engine.shares(), self.engine.stage.slices, self.saved_layout, self.runtime.rank)
        place, damaged = place_of(self.run), []
        if self.ledger:
            for problem in place.sweep():
                self.tell(f"[red]{escape(problem)}[/]", "leftover", reason=problem)
            newer = place.names()
            # Whatever is newer than the newest that verifies does not verify.
            damaged = [] if found.spread or checkpoint is None else newer[: newer.index(checkpoint.name)]
        if self.local and self.local.nodes.is_leader:
            self.local.place.sweep()
        self.saves = build_saves(
            self.run,
            place,
            attempt=self.attempt,
            group=self.runtime.groups.saves,
            is_coordinator=self.ledger is not None,
            tell=self.tell,
            may_commit=self._successor,
            damaged=damaged,
            local=self.local,
        )
        if checkpoint is None:
            self._draw_weights()
            self.engine.refresh()
            return Position()
        self._load(checkpoint, found.spread)
        return checkpoint.position

    def _load(self, checkpoint: Checkpoint, spread: Spread | None) -> None:
        read, problem = 0, []
        pieces = [piece for piece in self.pieces() if split_name(piece.name)[0] in checkpoint.saved.states]
        if spread:
            self.local.gather(spread, pieces, attempt=self.attempt)
        try:
            read = load_pieces(checkpoint, pieces)
        except UserError as error:
            problem = [str(error)]
        problems = gather_texts(problem, group=self.runtime.groups.control)
        if problems:
            raise UserError("; ".join(problems))
        self.engine.set_step(checkpoint.position.step)
        self.engine.refresh()
        self.saves.saved_at = checkpoint.position.step
        step, changed = checkpoint.position.step, changed_settings(checkpoint, self.run)
        self.tell(f"resumed from {escape(str(checkpoint))}", "resume", step=step, bytes_read=read, changed=changed)
        for change in changed:
            if change.startswith("data.train:"):
                continue  # what that means for the data is told by itself
            self.tell(f"[yellow]changed since then:[/] {escape(change)}")

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
        self.saves.poll()
        successor = self._successor()
        broken = not math.isfinite(grad_norm) or self.saves.diverged is not None
        known = [self.request.signal is not None, broken, successor is not None]
        loss, asked, odd, fenced = all_reduce_sum(
            [float(loss_part), *map(float, known)], group=self.runtime.groups.control
        )
        if fenced:
            raise RunError(f"{self.folder}: {successor or 'a later attempt'}; this one stops unsaved")
        self._check_saved_state()
        if odd or not math.isfinite(loss):
            raise RunError(self._diverged(position, f"loss {loss}, gradient norm {grad_norm}"))
        ended = position.step >= self.run.train.steps
        save_every, eval_every = self.run.checkpoint.every, self.run.eval.every
        local = self.run.checkpoint.local
        save = bool(ended or asked or (save_every and position.step % save_every == 0))
        return Decision(
            loss=loss,
            save=save,
            save_local=local is not None and not save and position.step % local.every == 0,
            # Whoever asks to stop does not wait for an evaluation.
            evaluate=bool(ended or (not asked and eval_every and position.step % eval_every == 0)),
            stop=bool(asked),
        )

    def _diverged(self, position: Position, what: str) -> str:
        first = position.samples - self.run.train.global_batch
        text = (
            f"step {position.step}: {what}, on samples {first} to {position.samples - 1} of the run; the state is not saved, the newest checkpoint is that of step "
            f"{max(self.saves.saved_at, 0)}; lower optim.lr, or look at the data of that step"
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

    def save(self, position: Position, *, last: bool = False, local: bool = False) -> None:
        """Save and prune: in the background, or to the end at the `last` save; `local`: on the nodes. Collective.

        A save that fails is loud and the run goes on with the checkpoints before. Raises RunError when the state has
        diverged.
        """
        pieces = [piece for piece in self.pieces() if piece.owner]
        wait = last or not self.run.checkpoint.asynchronous
        self.saves.begin(position, pieces, self._state(), wait=wait, local=local)
        self._check_saved_state()
        self.start_clock()

    def _check_saved_state(self) -> None:
        if self.saves.diverged:
            position, error = self.saves.diverged
            raise RunError(self._diverged(position, str(error))) from error

    def _successor(self) -> str | None:
        """Why this start may no longer write into the run, or None."""
        successor = self.ledger.successor() if self.ledger else None
        return f"{successor} has taken over" if successor else None

    def _state(self) -> dict[str, Any]:
        """What a checkpoint says of the run beside its tensors. All randomness is a function of the seeds here."""
        return {
            "layout": self.saved_layout.to_json(),
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
            (self.folder / EVALS).mkdir(exist_ok=True)
            write_file(self.folder / EVALS / name, json.dumps(body, indent=1).encode())
        except OSError as error:  # the results still go to console, ledger and metrics
            self.tell(f"[red]{escape(str(error))}[/]", "results_not_kept", step=position.step, reason=str(error))
        for task, result in self.last_results.items():
            self.tell(f"[cyan]eval[/] {describe(task, result)}", "eval", step=position.step, task=task, **result)
            numbers = {f"eval/{Path(task).stem}/{key}": value for key, value in result.items()}
            self.steps_log.write(step=position.step, samples=position.samples, **numbers)

    def tell(self, text: str, event: str | None = None, **fields: Any) -> None:
        """Say a line to the reader, if there is one, on the coordinator, and write an event where one is named."""
        if text:
            log.info("%s", Text.from_markup(text).plain)
        if self.ledger:
            if text:
                self.steps_log.say(text)
            if event:
                self.ledger.write(event, **fields)
