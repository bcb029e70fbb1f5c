"""One plain process as the truth, and how far a layout may be from it: in float32, by rounding alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from small_runs import (
    STEPS,
    Case,
    Held,
    State,
    assemble,
    coordinator_on_rank,
    counted_at,
    documents_at,
    on_ranks,
    restore_on_rank,
    state_on_rank,
    steps_on_rank,
    tokens_at,
)
from torch import Tensor
from torch.nn import functional as F

from llama_dist.model.init import init_
from llama_dist.model.llama import Documents, Llama
from llama_dist.pipeline.partitions import MOMENTS
from llama_dist.train.optim import lr_at

TRAINED = 5  # optimizer steps that are compared
LIMITS = {
    "loss": 2e-6,  # relative, in every step
    "norm": 2e-6,  # relative, of the gradient before clipping, in every step
    "weights": 1e-5,  # of each logical tensor, relative to its norm
    # Weights move little in five steps, and AdamW hides a wrong scale: movement and moments must agree too.
    "movement": 5e-5,
    "moments": 1e-5,
    "log_probs": 1e-5,  # absolute, of every token that `forward_only` scores
}
IGNORED = -100  # stands for targets that do not count
SCORED = (3, 12)  # sequences and tokens that `forward_only` is given: neither divides by two or four but for the tokens


@dataclass(frozen=True)
class Plain:
    """What one process without any parallel code computes."""

    curve: list[tuple[float, float]]
    first: dict[str, np.ndarray]
    final: dict[str, np.ndarray]
    moments: dict[str, dict[str, np.ndarray]]
    first_gradients: dict[str, np.ndarray]
    log_probs: np.ndarray


def masked_attention(query: Tensor, key: Tensor, value: Tensor, documents: Documents | None) -> Tensor:
    """Attention as it is written on paper, with one explicit mask: earlier positions of the same document."""
    batch, heads, length, head_dim = query.shape
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    position = torch.arange(length)
    document = torch.zeros(batch, length, dtype=torch.int64)
    for row, begins in enumerate(documents or ()):
        for begin in begins:
            document[row, begin:] += 1
    seen = (document[:, :, None] == document[:, None, :]) & (position[:, None] >= position[None, :])
    scores = (query @ key.transpose(2, 3) / math.sqrt(head_dim)).masked_fill(~seen[:, None], -math.inf)
    return scores.softmax(dim=-1) @ value


def plain_model(case: Case) -> Llama:
    """The model with the first weights of a run, whole, and with an attention that the product does not have."""
    model = Llama(case.run.model)
    init_(model, case.run.model, case.run.train.seed)
    for layer in model.model.layers.values():
        layer.self_attn.attend = masked_attention
    return model


@torch.no_grad()
def log_probs_of(model: Llama, tokens: Tensor) -> Tensor:
    """(batch, time - 1): the log-probability of each token but the first."""
    everything = model(tokens[:, :-1]).log_softmax(dim=-1)
    return everything.gather(2, tokens[:, 1:, None]).squeeze(2)


def scored_tokens(case: Case) -> Tensor:
    rows, length = SCORED
    return tokens_at(case, step=99)[:rows, : min(length, case.seq_len + 1)]


def targets_at(case: Case, step: int) -> Tensor:
    """(global_batch, seq_len) int64: the next tokens, IGNORED where they do not count."""
    targets, counted = tokens_at(case, step)[:, 1:], counted_at(case, step)
    return targets if counted is None else targets.masked_fill(~counted, IGNORED)


def plain_training(case: Case, *, steps: int = TRAINED) -> Plain:
    """A loop that anybody would write in plain PyTorch: whole batch, autograd, clip_grad_norm_, AdamW."""
    run = case.run
    model = plain_model(case)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": run.optim.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=run.optim.lr, betas=run.optim.betas, eps=run.optim.eps, foreach=False)
    first, curve, gradients = arrays_of(model), [], {}
    for step in range(steps):
        logits = model(tokens_at(case, step)[:, :-1], documents=documents_at(case, step))
        loss = F.cross_entropy(logits.flatten(0, 1), targets_at(case, step).flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        gradients = gradients or {name: p.grad.numpy().copy() for name, p in model.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), case.grad_clip or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(run.optim, step, steps=STEPS)
        optimizer.step()
        curve.append((loss.item(), norm.item()))
    moments = {
        name: {moment: optimizer.state[p][moment].numpy().copy() for moment in MOMENTS}
        for name, p in model.named_parameters()
    }
    log_probs = log_probs_of(model, scored_tokens(case)).numpy()
    return Plain(curve, first, arrays_of(model), moments, gradients, log_probs)


def arrays_of(model: Llama) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


@lru_cache(maxsize=64)
def _plain(unlaid: Case, steps: int) -> Plain:
    return plain_training(unlaid, steps=steps)


def plain(case: Case, *, steps: int = TRAINED) -> Plain:
    """The truth for a case, computed once for each model and data."""
    return _plain(case.unlaid, steps)


@dataclass(frozen=True)
class Trained:
    """What a rank knows after training."""

    curve: list[tuple[float, float]]
    state: list[Held]
    log_probs: np.ndarray


def train_on_rank(case: Case, steps: int = TRAINED) -> Trained:
    coordinator = coordinator_on_rank(case)
    curve = steps_on_rank(coordinator, case, restore_on_rank(coordinator), steps)
    log_probs = coordinator.runner.forward_only(scored_tokens(case)).numpy()
    return Trained(curve, state_on_rank(coordinator), log_probs)


@dataclass
class Deviation:
    """The largest deviations from the truth, and what is wrong."""

    largest: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LIMITS, 0.0))
    problems: list[str] = field(default_factory=list)

    def note(self, kind: str, value: float, where: str) -> None:
        if not value < LIMITS[kind]:  # also where it is no number
            self.problems.append(f"{where}: {kind} is off by {value:.2e} (limit {LIMITS[kind]:.0e})")
        self.largest[kind] = value if math.isnan(value) else max(self.largest[kind], value)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """How far apart two arrays are, relative to the second."""
    apart, size = (float(np.linalg.norm(x)) for x in (a.astype(np.float64) - b, b.astype(np.float64)))
    return apart / size if size else math.inf if apart else 0.0


def train_and_compare(case: Case, *, steps: int = TRAINED, timeout: float = 120.0) -> Deviation:
    """Train a case on its ranks and hold everything against one plain process. Raises WorkerFailure at a hang."""
    return compare(case, on_ranks(case, train_on_rank, steps, timeout=timeout), plain(case, steps=steps))


def compare(case: Case, ranks: list[Trained], expected: Plain) -> Deviation:
    found = Deviation()
    for rank, trained in enumerate(ranks):
        if trained.curve != ranks[0].curve:
            found.problems.append(f"rank {rank} knows another curve than rank 0: {trained.curve}, {ranks[0].curve}")
        if not np.array_equal(trained.log_probs, ranks[0].log_probs):
            found.problems.append(f"rank {rank} has other log-probabilities than rank 0")
    for step, (known, true) in enumerate(zip(ranks[0].curve, expected.curve, strict=True)):
        for kind, a, b in zip(("loss", "norm"), known, true, strict=True):
            found.note(kind, abs(a / b - 1), f"step {step}")
    if ranks[0].log_probs.shape != expected.log_probs.shape:
        found.problems.append(f"log-probabilities of shape {ranks[0].log_probs.shape}, not {expected.log_probs.shape}")
    else:
        found.note("log_probs", float(np.abs(ranks[0].log_probs - expected.log_probs).max()), "forward_only")
    try:
        state = assemble(case, [trained.state for trained in ranks])
    except (AssertionError, ValueError) as error:
        found.problems.append(str(error))
    else:
        _compare_state(found, state, expected)
    return found


def _compare_state(found: Deviation, state: State, expected: Plain) -> None:
    if state.keys() != expected.final.keys():
        found.problems.append(f"tensors {sorted(state.keys() ^ expected.final.keys())} are in one model only")
        return
    for name, arrays in state.items():
        found.note("weights", distance(arrays["master"], expected.final[name]), name)
        moved = expected.final[name] - expected.first[name]
        found.note("movement", distance(arrays["master"] - expected.first[name], moved), name)
        for moment in MOMENTS:
            found.note("moments", distance(arrays[moment], expected.moments[name][moment]), f"{moment} of {name}")
