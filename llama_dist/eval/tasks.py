"""What is measured on held-out text: perplexity of documents, and multiple choice."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_dist.data.shards import Shards
from llama_dist.data.tokenizer import Tokenizer
from llama_dist.errors import UserError
from llama_dist.eval.scoring import Replica, Request, Scorer, fit, log_likelihoods


# Not nothing: after a bare start of text a model expects how documents begin, which is no neutral place.
NEUTRAL = "\n"


@dataclass(frozen=True)
class Choice:
    """One multiple-choice item: which of `choices` continues `context`?"""

    context: str
    choices: tuple[str, ...]
    answer: int


def load_choices(path: str | Path) -> list[Choice]:
    """Read a benchmark of JSON lines {"context", "choices", "answer"}. UserError names the line that is broken."""
    try:
        # Not splitlines: JSON may hold a bare U+2028 or U+0085, which that takes for the end of a line.
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as multiple choice: {error}; check eval.choices") from error
    items = [_choice(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not items:
        raise UserError(f"{path}: holds no items; a multiple-choice benchmark has one JSON object a line")
    return items


def _choice(line: str, where: str) -> Choice:
    try:
        record = json.loads(line)
        item = Choice(record["context"], tuple(record["choices"]), record["answer"])
        fine = isinstance(item.context, str) and isinstance(record["choices"], list)
        fine = fine and all(isinstance(c, str) and c for c in item.choices)
        fine = fine and len(item.choices) > 1 and type(item.answer) is int and 0 <= item.answer < len(item.choices)
        "".join((item.context, *item.choices)).encode()  # half a surrogate pair, as JSON can escape it, is no text
    except (ValueError, KeyError, TypeError, RecursionError):
        fine = False
    if not fine:
        raise UserError(
            f"{where}: is not a multiple-choice item; expected "
            f'{{"context": text, "choices": [two or more texts], "answer": index of the right one}}'
        )
    return item


def windows(document: Sequence[int], *, seq_len: int) -> Iterator[Request]:
    """Cut a document so that every token but its first is scored once, within `seq_len` inputs.

    Each window begins with the last token of the one before (lm-evaluation-harness calls this rolling).
    """
    for start in range(0, len(document) - 1, seq_len):
        yield Request(tuple(document[start : start + seq_len + 1]))


def perplexity(
    scorer: Scorer, shards: Shards, *, seq_len: int, batch: int, replica: Replica, max_samples: int = 0
) -> dict[str, float]:
    """Loss in nats per token, and its exponential, over whole held-out documents (the first `max_samples`; 0: all)."""
    count = min(max_samples or shards.num_documents, shards.num_documents)
    documents = (shards.document(i).tolist() for i in range(count))
    requests = [request for document in documents for request in windows(document, seq_len=seq_len)]
    scored = sum(len(request.tokens) - 1 for request in requests)
    if not scored:
        raise UserError("data.heldout: its documents hold no token to score; prepare it from more text")
    loss = -sum(log_likelihoods(scorer, requests, batch=batch, replica=replica)) / scored
    return {"documents": count, "tokens": scored, "loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def multiple_choice(
    scorer: Scorer,
    items: Sequence[Choice],
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    batch: int,
    replica: Replica,
    max_samples: int = 0,
) -> dict[str, float]:
    """How often the right choice scores best, by three scores that lm-evaluation-harness has too.

    `accuracy` compares the summed log-likelihoods of the choices, `accuracy_norm` these divided by the choice's bytes,
    and `accuracy_mutual_info` the log-likelihoods after the context minus those after a mere line break, which takes
    out how likely a choice is by itself (Holtzman et al. 2021, domain-conditional PMI). `chance` is what guessing
    gives; the standard errors are binomial.
    """
    items = items[: max_samples or len(items)]
    pairs = [(item, choice) for item in items for choice in item.choices]
    given = [_request(tokenizer, item.context, choice, seq_len=seq_len) for item, choice in pairs]
    alone = [_request(tokenizer, NEUTRAL, choice, seq_len=seq_len) for _, choice in pairs]
    scores = log_likelihoods(scorer, given + alone, batch=batch, replica=replica)
    sums, priors = scores[: len(pairs)], scores[len(pairs) :]
    by_byte = [score / len(choice.encode()) for score, (_, choice) in zip(sums, pairs, strict=True)]
    gains = [score - prior for score, prior in zip(sums, priors, strict=True)]
    # A choice that alone is longer than the model's reach is scored by its end only; who reads the result must know.
    cut = sum(request.scored_from == 1 and len(request.tokens) > seq_len for request in alone)
    results: dict[str, float] = {"items": len(items), "choices_cut": cut}
    for name, ranked in (("accuracy", sums), ("accuracy_norm", by_byte), ("accuracy_mutual_info", gains)):
        share = _share_right(items, ranked)
        results[name] = share
        results[f"{name}_stderr"] = math.sqrt(share * (1 - share) / max(len(items) - 1, 1))
    results["chance"] = sum(1 / len(item.choices) for item in items) / len(items)
    return results


def _share_right(items: Sequence[Choice], scores: Sequence[float]) -> float:
    """The share of items whose answer has the greatest score; `scores` are those of all choices in a row."""
    right = at = 0
    for item in items:
        own = scores[at : at + len(item.choices)]
        right += max(range(len(own)), key=own.__getitem__) == item.answer
        at += len(own)
    return right / len(items)


def _request(tokenizer: Tokenizer, context: str, choice: str, *, seq_len: int) -> Request:
    """Tokens of context and choice together, scored from where the context's own tokens end."""
    first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    start = [] if first is None else [first]
    before = start + tokenizer.encode(context)
    whole = start + tokenizer.encode(context + choice)
    # A piece may span the border; the scored part then begins with it, and is never empty.
    return fit(whole, max(min(len(before), len(whole) - 1), 1), max_len=seq_len + 1)
