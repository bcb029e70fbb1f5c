"""What may change between two starts of a run, and what may not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llama_dist.checkpoint.store import Checkpoint
from llama_dist.checkpoint.whole import config_of
from llama_dist.config import RunConfig
from llama_dist.errors import UserError

FIXED = ("model.", "data.seq_len", "data.seed", "data.document_mask", "train.seed")  # the mathematics of the run and the order of its data


def check_same_run(checkpoint: Checkpoint, run: RunConfig, *, data_fingerprint: str) -> None:
    """Refuse to continue a checkpoint under a config that would give another model or another order of the data.

    Layout, precision, learning rate, batch, number of steps and evaluation may change; raises UserError naming what
    may not.
    """
    changed = [change for change in changed_settings(checkpoint, run) if change.startswith(FIXED)]
    if checkpoint.manifest["data_fingerprint"] != data_fingerprint:
        changed.append("data.train: other shards or weights than then")
    if changed:
        raise UserError(
            f"{checkpoint.path}: was saved by a run with another config; undo the change or take another `folder`. "
            + "; ".join(changed)
        )


def changed_settings(checkpoint: Checkpoint, run: RunConfig) -> list[str]:
    """Every setting that is not what it was when the checkpoint was saved, with both values."""
    # Settings that came into being since then had their defaults.
    then = dict(_flat(config_of(checkpoint).model_dump(mode="json")))
    now = dict(_flat(run.model_dump(mode="json")))
    names = [name for name in {**then, **now} if then.get(name) != now.get(name) and name not in ("name", "folder")]
    return [f"{name}: {then.get(name)} then, {now.get(name)} now" for name in names]


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
