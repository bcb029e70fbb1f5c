"""Text out of a model: greedy or sampled continuation of token sequences with a key/value cache."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from llama_dist.config import ModelConfig
from llama_dist.errors import UserError
from llama_dist.model.llama import Cache, Llama

_PREFILL = 512  # prompt tokens at a time: bounds the logits, (batch, _PREFILL, vocab_size)


class LanguageModel(Protocol):
    """Whatever can tell what comes next: a PipelineRunner on any layout, or a plain model."""

    config: ModelConfig

    def logits(self, tokens: Tensor, *, start: int, cache: Cache) -> Tensor:
        """Logits after the last of `tokens` (batch, time): (batch, vocab_size), float32 on the model's device."""
        ...


class PlainModel:
    """A whole model in one process."""

    def __init__(self, model: Llama) -> None:
        self.model = model
        self.config = model.config

    @torch.inference_mode()
    def logits(self, tokens: Tensor, *, start: int, cache: Cache) -> Tensor:
        tokens = tokens.to(next(self.model.parameters()).device)
        return self.model(tokens, start=start, cache=cache)[:, -1].float()


def generate(
    model: Llama | LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_id: int | Collection[int] | None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[list[int]]:
    """Continue every prompt; returns the new tokens of each, with `eos_id` (one of them) as the last where the
    model ended there.

    Temperature 0 is greedy. Otherwise one draws from softmax(logits / temperature), cut to the `top_k` likeliest
    tokens (0 = all) and then to the fewest of these that hold `top_p` of their probability. A prompt's draws are a
    function of (seed, its place in `prompts`, how many tokens it has got), so other prompts do not change them.

    Prompts of unequal length need neither padding nor masks: all advance together from the end of the shortest,
    and at a column where a prompt still goes on, its own token is taken instead of the model's. On several ranks all
    must call it with the same arguments, and get the same answer.
    """
    model = PlainModel(model) if isinstance(model, Llama) else model
    limits = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    _check(model.config, prompts, **limits)
    if not prompts:
        return []
    ends = {eos_id} if isinstance(eos_id, int) else set(eos_id or ())
    lengths = [len(prompt) for prompt in prompts]
    uniforms = [np.random.default_rng([seed, row]).random(max_new_tokens) for row in range(len(prompts))]
    sequences = [list(prompt) for prompt in prompts]
    cache = Cache(max(lengths) + max_new_tokens)
    ended = [False] * len(prompts)
    start = 0
    while not all(ended):
        stop = max(start + 1, min(start + _PREFILL, min(lengths)))
        ids = torch.tensor([_window(tokens, start, stop) for tokens in sequences])
        logits = model.logits(ids, start=start, cache=cache).cpu()
        for row, tokens in enumerate(sequences):
            if ended[row] or len(tokens) > stop:
                continue
            drawn = uniforms[row][stop - lengths[row]]
            tokens.append(_pick(logits[row], drawn, temperature=temperature, top_k=top_k, top_p=top_p))
            ended[row] = tokens[-1] in ends or len(tokens) == lengths[row] + max_new_tokens
        start = stop
    return [tokens[length:] for tokens, length in zip(sequences, lengths, strict=True)]


def token_probabilities(logits: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """What `generate` draws from: logits (vocab_size,) -> probabilities (vocab_size,) float64, temperature > 0."""
    probabilities = torch.softmax(logits.double() / temperature, dim=-1)
    # Stable, so that equally likely tokens are kept in the same order on every machine.
    ordered, tokens = probabilities.sort(descending=True, stable=True)
    if top_k:
        ordered[top_k:] = 0
    if top_p < 1:
        before = ordered.cumsum(0) - ordered
        ordered[before >= top_p * ordered.sum()] = 0
    return torch.zeros_like(probabilities).scatter_(0, tokens, ordered / ordered.sum())


def _pick(logits: Tensor, drawn: float, *, temperature: float, top_k: int, top_p: float) -> int:
    if temperature == 0:
        return int(logits.argmax())
    cumulative = token_probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p).cumsum(0)
    # Over the last sum, which rounding may leave short of 1; from the right, so that probability 0 is never drawn.
    return int(torch.searchsorted(cumulative / cumulative[-1], drawn, right=True))


def _window(tokens: list[int], start: int, stop: int) -> list[int]:
    """Tokens [start, stop) of a row; one that has ended earlier is fed its last token, whose output nobody reads."""
    return tokens[start:stop] or tokens[-1:]


def _check(
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
) -> None:
    for name, value, fits, allowed in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "1 or more"),
        ("temperature", temperature, 0 <= temperature < float("inf"), "0 (greedy) or more"),
        ("top_k", top_k, top_k >= 0, "0 (all tokens) or more"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0, up to 1"),
        ("seed", seed, seed >= 0, "0 or more"),
    ):
        if not fits:
            raise UserError(f"generate: {name} is {value}; allowed is {allowed}")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"generate: prompt {row} has no tokens; give at least one")
        if wrong := [token for token in prompt if not 0 <= token < config.vocab_size]:
            known = f"the model has 0 to {config.vocab_size - 1}"
            raise UserError(f"generate: prompt {row} has token {wrong[0]}; {known}; check the tokenizer")
        if len(prompt) + max_new_tokens > config.max_position_embeddings:
            raise UserError(
                f"generate: prompt {row} has {len(prompt)} tokens and {max_new_tokens} new ones are asked for, but the "
                f"model has {config.max_position_embeddings} positions; ask for fewer or shorten the prompt"
            )
