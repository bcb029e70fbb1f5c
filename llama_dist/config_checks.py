"""What must hold between settings: each check says with which numbers it fails and which values would pass.

A check is a function of a few settings, so all that can be judged is judged even where other settings are wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llama_dist.config_data import DATA_CHECKS
from llama_dist.config_layouts import LAYOUT_CHECKS, LAYOUT_SETTINGS, nearest_text, some_layout_fits
from llama_dist.config_numbers import Check, choice, divisors, either_side


def find_conflicts(known: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(setting, problem) for every check all of whose settings are known."""
    layout = _found(LAYOUT_CHECKS, known)
    if layout and known.keys() >= LAYOUT_SETTINGS and some_layout_fits(known):
        name, problem = layout[0]
        layout[0] = (name, f"{problem}; {nearest_text(known, _world(known))}")
    return _found(CHECKS, known) + layout


def _found(checks: Sequence[Check], known: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (check.settings[0], problem)
        for check in checks
        if all(name in known for name in check.settings)
        for problem in check.problems(*(known[name] for name in check.settings))
    ]


def _world(known: Mapping[str, Any]) -> int | None:
    """The world size, where the config says it."""
    axes = [known[f"parallel.{axis}"] for axis in ("dp", "tp", "pp", "cp")]
    return None if axes[0] == "auto" else math.prod(axes)


def _kv_heads(kv_heads: int, heads: int) -> Iterator[str]:
    if heads % kv_heads:
        fit = choice(divisors(heads), kv_heads)
        yield (
            f"model.num_key_value_heads={kv_heads} does not divide model.num_attention_heads={heads}; "
            f"use num_key_value_heads in {fit}"
        )


def _heads(heads: int, hidden: int, head_dim: int) -> Iterator[str]:
    # A head_dim other than the default was given on purpose, and then heads need not fill the hidden size.
    if hidden % heads and head_dim == hidden // heads:
        yield (
            f"model.num_attention_heads={heads} does not divide model.hidden_size={hidden}; "
            f"use num_attention_heads in {choice(divisors(hidden), heads)}, or give model.head_dim"
        )


def _head_dim(head_dim: int) -> Iterator[str]:
    if head_dim % 2:
        yield (
            f"model.head_dim={head_dim} is odd, and rotary embeddings turn pairs; "
            f"use head_dim={either_side(head_dim, 2)}"
        )


def _rope_bands(low: float, high: float) -> Iterator[str]:
    if high <= low:
        yield (
            f"model.rope_scaling.high_freq_factor={high:g} is not above model.rope_scaling.low_freq_factor={low:g}; "
            "Llama 3.1 uses 4 and 1"
        )


def _rope_range(original: int, positions: int) -> Iterator[str]:
    if original > positions:
        yield (
            f"model.rope_scaling.original_max_position_embeddings={original} exceeds "
            f"model.max_position_embeddings={positions}; use original_max_position_embeddings <= {positions}"
        )


def _recomputation(every: int | str, layers: int) -> Iterator[str]:
    if isinstance(every, int) and every > layers:
        yield (
            f"parallel.activation_checkpointing={every} exceeds model.num_hidden_layers={layers}, so that no layer "
            f"would be recomputed; use a number from 2 to {layers}, or none"
        )


def _warmup(warmup: int, steps: int) -> Iterator[str]:
    if warmup > steps:
        yield f"optim.warmup_steps={warmup} exceeds train.steps={steps}; use warmup_steps <= {steps}"


def _decay(decay: int | None, schedule: str, warmup: int, steps: int) -> Iterator[str]:
    if schedule == "cosine":
        if decay is not None:
            yield (
                f"optim.decay_steps={decay} is for optim.schedule=wsd (cosine decays from the warm-up to the end); "
                "leave decay_steps out, or use schedule=wsd"
            )
    elif decay is None:
        yield f"optim.schedule=wsd needs optim.decay_steps; use for example decay_steps={max(1, steps // 10)}"
    elif warmup <= steps and warmup + decay > steps:
        yield (
            f"optim.decay_steps={decay} and optim.warmup_steps={warmup} exceed train.steps={steps}; "
            f"use decay_steps <= {steps - warmup}"
        )


def _positions(seq_len: int, positions: int) -> Iterator[str]:
    if seq_len > positions:
        yield (
            f"data.seq_len={seq_len} exceeds model.max_position_embeddings={positions}; use seq_len <= {positions}"
        )


def _something_to_evaluate(every: int, perplexity: bool, choices: list[str], heldout: str | None) -> Iterator[str]:
    if every and not choices and not (perplexity and heldout):
        yield (
            f"eval.every={every} with nothing to evaluate; give data.heldout (with eval.perplexity=true) or "
            "eval.choices, or use eval.every=0"
        )


def _best(best: str | None, every: int, perplexity: bool, choices: list[str], heldout: str | None) -> Iterator[str]:
    if best is None:
        return
    measured = [f"heldout/{key}" for key in ("loss", "perplexity") if perplexity and heldout]
    for path in choices:
        measured += [f"{path}/{key}" for key in ("accuracy", "accuracy_norm", "accuracy_mutual_info")]
    if not measured or not every:
        yield f"checkpoint.best={best!r} needs evaluations; give data.heldout or eval.choices, and eval.every"
    elif best not in measured:
        yield f"checkpoint.best={best!r} is not measured; use one of {', '.join(measured)}"


def _model(*names: str) -> tuple[str, ...]:
    return tuple(f"model.{name}" for name in names)


CHECKS: tuple[Check, ...] = (
    Check(_model("num_key_value_heads", "num_attention_heads"), _kv_heads),
    Check(_model("num_attention_heads", "hidden_size", "head_dim"), _heads),
    Check(_model("head_dim"), _head_dim),
    Check(_model("rope_scaling.low_freq_factor", "rope_scaling.high_freq_factor"), _rope_bands),
    Check(_model("rope_scaling.original_max_position_embeddings", "max_position_embeddings"), _rope_range),
    Check(("parallel.activation_checkpointing", "model.num_hidden_layers"), _recomputation),
    Check(("optim.warmup_steps", "train.steps"), _warmup),
    Check(("optim.decay_steps", "optim.schedule", "optim.warmup_steps", "train.steps"), _decay),
    Check(("data.seq_len", "model.max_position_embeddings"), _positions),
    Check(("eval.every", "eval.perplexity", "eval.choices", "data.heldout"), _something_to_evaluate),
    Check(("checkpoint.best", "eval.every", "eval.perplexity", "eval.choices", "data.heldout"), _best),
    *DATA_CHECKS,
)
