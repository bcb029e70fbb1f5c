"""What may change between two starts of a run, and what may not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from llama_dist.checkpoint.store import Checkpoint
from llama_dist.checkpoint.whole import config_of, is_imported
from llama_dist.config import RunConfig
from llama_dist.config_data import DataConfig
from llama_dist.data.history import History, Pace
from llama_dist.data.mixture import Phase
from llama_dist.data.sources import OpenSource, open_sources
from llama_dist.errors import UserError

# The mathematics of the run, and what its samples are.
FIXED = ("model.", "data.seq_len", "data.seed", "data.packing", "data.document_mask", "train.seed")
# Of a model whose weights were imported: how a model begins is of the past, and how far it reaches is the run's choice.
FREE_OF_IMPORTED = ("model.initializer_range", "model.max_position_embeddings")


def check_same_run(checkpoint: Checkpoint, run: RunConfig) -> None:
    """Refuse to continue a checkpoint under a config that would give another model or other samples.

    Layout, precision, learning rate, batch, number of steps, evaluation and the mixture of the data may change; raises
    UserError naming what may not. Weights that were imported go with whatever run trains the same model.
    """
    if is_imported(checkpoint):
        _check_same_model(checkpoint, run)
        return
    changed = [change for change in changed_settings(checkpoint, run) if change.startswith(FIXED)]
    if changed:
        raise UserError(
            f"{checkpoint}: was saved by a run with another config; undo the change or take another `folder`. "
            + "; ".join(changed)
        )


def _check_same_model(checkpoint: Checkpoint, run: RunConfig) -> None:
    then = dict(flat(checkpoint.saved.model.model_dump(mode="json"), "model."))
    now = dict(flat(run.model.model_dump(mode="json"), "model."))
    names = [name for name in {**then, **now} if then.get(name) != now.get(name) and name not in FREE_OF_IMPORTED]
    if names:
        differing = "; ".join(f"{name}: {then.get(name)} there, {now.get(name)} in the config" for name in names)
        raise UserError(
            f"{checkpoint}: holds the imported weights of another model; name the model.yaml that lies beside its "
            f"checkpoints as `model`, or take another `folder`. {differing}"
        )


def changed_settings(checkpoint: Checkpoint, run: RunConfig) -> list[str]:
    """Every setting that is not what it was when the checkpoint was saved, with both values."""
    if is_imported(checkpoint):
        return []
    # Settings that came into being since then had their defaults.
    then = dict(flat(config_of(checkpoint).model_dump(mode="json")))
    now = dict(flat(run.model_dump(mode="json")))
    names = [name for name in {**then, **now} if then.get(name) != now.get(name) and name not in ("name", "folder")]
    return [f"{name}: {then.get(name)} then, {now.get(name)} now" for name in names]


def history_of(checkpoint: Checkpoint, run: RunConfig) -> History | None:
    """What the run had read when it saved a checkpoint, and what it was to read then; of imported weights None.

    Older checkpoints have only a hash of their one mixture: it must be that of the config of now or of then. Raises
    UserError where it is neither's.
    """
    manifest = checkpoint.manifest
    if is_imported(checkpoint):
        return None
    if "data" in manifest:
        return History.from_json(manifest["data"])
    then = config_of(checkpoint)
    for data in (run.data, then.data):
        if any(source.stream is not None for source in data.train):
            continue  # younger than such checkpoints
        try:
            sources = open_sources(data, vocab_size=run.model.vocab_size)
        except UserError:
            continue  # what the config of now has wrong was said before; the files of then may be gone
        if _fingerprint(sources, data) == manifest["data_fingerprint"]:
            phase = Phase(0, tuple(enumerate(source.weight for source in data.train)))
            position, batch = checkpoint.position, then.train.global_batch
            whole = position.samples == position.step * batch  # the batch has always been this
            pace = Pace(0, 0, batch) if whole else Pace(position.step, position.samples, batch)
            return History(tuple(source.known for source in sources), (phase,), (pace,))
    raise UserError(
        f"{checkpoint}: was saved by a run with other data; undo the change or take another `folder`. "
        "data.train: other shards or weights than then, and this checkpoint is too old to say which"
    )


def _fingerprint(sources: Sequence[OpenSource], data: DataConfig) -> str:
    """How checkpoints without a history name their data."""
    digest = hashlib.sha256()
    for source, settings in zip(sources, data.train, strict=True):
        manifest = source.shards.manifest
        files = manifest.files if manifest else source.shards.sample_checksums()
        digest.update(json.dumps([files, settings.weight], sort_keys=True).encode())
    return digest.hexdigest()


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A tree of settings as ("data.seq_len", 2048) and so on."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
