"""Scores are sums of the scored tokens' log-probabilities, whatever they are batched or padded with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from llama_dist.eval import scoring
from llama_dist.eval.scoring import PAD, PlainScorer, Replica, Request, fit, log_likelihoods

VOCAB = 11


class Counting(nn.Module):
    """A model whose logit for token v after the tokens so far is a function of their sum: it looks at all of them."""

    def forward(self, tokens: Tensor) -> Tensor:
        seen = tokens.cumsum(dim=1).unsqueeze(-1).double()
        return torch.sin(seen + torch.arange(VOCAB)).float()


class Recording(PlainScorer):
    """Keeps the batches it was asked for."""

    def __init__(self) -> None:
        super().__init__(Counting(), device=torch.device("cpu"))
        self.batches: list[Tensor] = []

    def forward_only(self, tokens: Tensor) -> Tensor:
        self.batches.append(tokens.clone())
        return super().forward_only(tokens)


def by_hand(request: Request) -> float:
    """One token at a time, in double precision."""
    total = 0.0
    for i in range(request.scored_from, len(request.tokens)):
        logits = [math.sin(sum(request.tokens[:i]) + v) for v in range(VOCAB)]
        total += logits[request.tokens[i]] - math.log(sum(map(math.exp, logits)))
    return total


def some_requests(count: int) -> list[Request]:
    lengths = [2 + (7 * i) % 9 for i in range(count)]
    return [
        Request(tuple((3 * i + 5 * j * j) % VOCAB for j in range(n)), 1 + (i % (n - 1))) for i, n in enumerate(lengths)
    ]


@pytest.mark.parametrize("batch", [1, 2, 5, 100])
def test_scores_are_those_by_hand_in_the_order_of_the_requests(batch: int) -> None:
    requests = some_requests(13)
    found = log_likelihoods(Recording(), requests, batch=batch, replica=Replica())
    assert found == pytest.approx([by_hand(request) for request in requests], rel=1e-6)


def test_batches_are_cut_from_the_longest_down_and_padded_on_the_right() -> None:
    scorer = Recording()
    requests = some_requests(7)
    log_likelihoods(scorer, requests, batch=3, replica=Replica())
    assert [batch.shape[0] for batch in scorer.batches] == [3, 3, 1]
    widths = [batch.shape[1] for batch in scorer.batches]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] == max(len(request.tokens) for request in requests)
    rows = [row.tolist() for batch in scorer.batches for row in batch]
    expected = sorted(requests, key=lambda request: -len(request.tokens))
    for row, request in zip(rows, expected, strict=True):
        assert row == [*request.tokens, *[PAD] * (len(row) - len(request.tokens))]


def test_only_the_scored_part_counts() -> None:
    tokens = (1, 2, 3, 4, 5)
    whole, tail, last = log_likelihoods(
        Recording(), [Request(tokens), Request(tokens, 3), Request(tokens, 4)], batch=2, replica=Replica()
    )
    assert whole < tail < last < 0
    assert whole == pytest.approx(by_hand(Request(tokens)), rel=1e-6)
    assert last == pytest.approx(by_hand(Request(tokens, 4)), rel=1e-6)


@pytest.mark.parametrize("dp", [1, 2, 3, 4, 8])
def test_replicas_share_the_batches_and_call_equally_often(dp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = some_requests(13)  # 5 batches of 3
    parts: list[Tensor] = []
    calls: list[int] = []
    monkeypatch.setattr(scoring.dist, "all_reduce", lambda tensor, group: parts.append(tensor.clone()))
    for rank in range(dp):
        scorer = Recording()
        log_likelihoods(scorer, requests, batch=3, replica=Replica(group=object(), dp=dp, dp_rank=rank))
        calls.append(len(scorer.batches))
    assert set(calls) == {-(-5 // dp)}, "uneven calls hang ZeRO-3"
    stacked = torch.stack(parts)
    assert stacked.ne(0).sum(dim=0).eq(1).all(), "each request is scored by exactly one replica"
    alone = log_likelihoods(Recording(), requests, batch=3, replica=Replica())
    assert stacked.sum(dim=0).tolist() == alone


def test_a_rank_that_does_not_report_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[Tensor] = []
    monkeypatch.setattr(scoring.dist, "all_reduce", lambda tensor, group: parts.append(tensor.clone()))
    scorer = Recording()
    log_likelihoods(scorer, some_requests(4), batch=3, replica=Replica(group=object(), reports=False))
    assert parts[0].eq(0).all()
    assert len(scorer.batches) == 2, "it runs the model like the others"


def test_no_requests_are_no_work() -> None:
    scorer = Recording()
    assert log_likelihoods(scorer, [], batch=3, replica=Replica()) == []
    assert scorer.batches == []


@pytest.mark.parametrize(
    ("tokens", "scored_from", "max_len", "expected"),
    [
        (range(5), 2, 8, Request((0, 1, 2, 3, 4), 2)),
        (range(5), 2, 5, Request((0, 1, 2, 3, 4), 2)),
        (range(8), 6, 5, Request((3, 4, 5, 6, 7), 3)),
        (range(8), 2, 5, Request((3, 4, 5, 6, 7), 1)),  # not even the scored part fits: its end is scored
    ],
)
def test_a_request_is_cut_on_the_left(tokens: Sequence[int], scored_from: int, max_len: int, expected: Request) -> None:
    assert fit(list(tokens), scored_from, max_len=max_len) == expected


def test_a_plain_scorer_keeps_no_graph() -> None:
    model = nn.Sequential(nn.Embedding(VOCAB, 4), nn.Linear(4, VOCAB))
    log_probs = PlainScorer(model, device=torch.device("cpu")).forward_only(torch.tensor([[1, 2, 3]]))
    assert log_probs.shape == (1, 2)
    assert not log_probs.requires_grad
    assert log_probs.dtype == torch.float32
    expected = model(torch.tensor([[1, 2]])).log_softmax(-1)[0, [0, 1], [2, 3]]
    torch.testing.assert_close(log_probs[0], expected.detach())
