"""Log-likelihoods of continuations, batched the same way on every layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from llama_dist.parallel.loss import token_losses

PAD = 0  # any id: padding stands right of all scored tokens, where causal attention cannot see it


@dataclass(frozen=True)
class Request:
    """Score `tokens[scored_from:]`, each given all tokens before it; `scored_from` is at least 1."""

    tokens: tuple[int, ...]
    scored_from: int = 1


class Scorer(Protocol):
    """Whatever can tell next-token log-probabilities: a PipelineRunner on any layout, or a plain model."""

    def forward_only(self, tokens: Tensor) -> Tensor:
        """(batch, time) int64 -> (batch, time - 1) float32: log p of each token but the first, given those before."""
        ...


class PlainScorer:
    """A whole model in one process, on `device`."""

    def __init__(self, model: torch.nn.Module, *, device: torch.device) -> None:
        self.model = model
        self.device = device

    @torch.no_grad()
    def forward_only(self, tokens: Tensor) -> Tensor:
        tokens = tokens.to(self.device)
        return -token_losses(self.model(tokens[:, :-1]), tokens[:, 1:])


@dataclass(frozen=True)
class Replica:
    """Which share of the requests a rank scores; all ranks of `group` join in the result."""

    group: dist.ProcessGroup | None = None
    dp: int = 1
    dp_rank: int = 0
    reports: bool = True  # one rank of each replica adds its scores to the sum; the others add zeros


def fit(tokens: Sequence[int], scored_from: int, *, max_len: int) -> Request:
    """A request that the model can take: tokens are cut from the left, where the context is, down to `max_len`."""
    cut = max(len(tokens) - max_len, 0)
    return Request(tuple(tokens[cut:]), max(scored_from - cut, 1))


def log_likelihoods(scorer: Scorer, requests: Sequence[Request], *, batch: int, replica: Replica) -> list[float]:
    """The summed log-probability of each request's scored tokens, in nats, in the order of the requests.

    Batches are cut from the requests sorted by length, so that they are the same on any layout; replica r takes
    every dp-th. Every replica runs equally many (an empty batch pads), because uneven calls hang ZeRO-3.
    """
    order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].tokens), i))
    batches = [order[i : i + batch] for i in range(0, len(order), batch)]
    rounds = -(-len(batches) // replica.dp)
    scores = torch.zeros(len(requests), dtype=torch.float64)
    for i in range(rounds):
        mine = i * replica.dp + replica.dp_rank
        # The first batch, the longest, stands in where there is none left; its scores are not used.
        members = batches[mine] if mine < len(batches) else batches[0]
        found = _score([requests[i] for i in members], scorer)
        if mine < len(batches) and replica.reports:
            scores[torch.tensor(members)] = found
    if replica.group is not None:
        dist.all_reduce(scores, group=replica.group)
    return scores.tolist()


def _score(requests: Sequence[Request], scorer: Scorer) -> Tensor:
    longest = max(len(request.tokens) for request in requests)
    tokens = torch.full((len(requests), longest), PAD, dtype=torch.int64)
    scored = torch.zeros(len(requests), longest - 1, dtype=torch.bool)
    for row, request in enumerate(requests):
        tokens[row, : len(request.tokens)] = torch.tensor(request.tokens)
        scored[row, request.scored_from - 1 : len(request.tokens) - 1] = True
    log_probs = scorer.forward_only(tokens).cpu().double()
    return torch.where(scored, log_probs, 0.0).sum(dim=1)
