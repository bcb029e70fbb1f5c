"""Weights from elsewhere become a checkpoint at step 0, from which a run begins under any layout."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from llama_dist import __version__
from llama_dist.checkpoint.places import LocalPlace
from llama_dist.checkpoint.plan import SavedLayout, file_name
from llama_dist.checkpoint.store import Position, folder_name, seal
from llama_dist.config import ModelConfig
from llama_dist.config_yaml import dump_yaml
from llama_dist.errors import UserError
from llama_dist.exchange.meta import MetaWeights
from llama_dist.exchange.target import new_folder
from llama_dist.exchange.weights import rows_of
from llama_dist.files import write_file
from llama_dist.layout import Layout
from llama_dist.model.hf import HuggingFaceWeights

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
MODEL = "model.yaml"


def import_weights(weights: HuggingFaceWeights | MetaWeights, folder: str | Path) -> list[str]:
    """Write `folder`: checkpoints/step-00000000 with the weights in float32, model.yaml, and the tokenizer's files.

    Returns the names of the tokenizer's files. No more than a block of a tensor is held at a time. Raises UserError where
    the folder is not empty or cannot be written to, and for weights that are no finite numbers; it is then not there.
    """
    source = Path(weights.where)
    with new_folder(folder) as draft:
        copied = [name for name in TOKENIZER_FILES if (source / name).is_file()]
        for name in copied:
            shutil.copyfile(source / name, draft / name)
        settings = weights.model.model_dump(mode="json")
        write_file(draft / MODEL, dump_yaml(settings).encode())
        _write_checkpoint(weights, LocalPlace(draft / "checkpoints"))
    return copied


def whole_layout(model: ModelConfig) -> SavedLayout:
    """Weights alone, in the one file of one rank, tensor after tensor."""
    return SavedLayout(model, Layout(1), 3, (range(model.num_hidden_layers),), states=("",))


def _write_checkpoint(weights: HuggingFaceWeights | MetaWeights, place: LocalPlace) -> None:
    saved, position = whole_layout(weights.model), Position()
    name = folder_name(position)
    draft = place.draft(name, 0)
    place.begin(draft)
    with place.create(draft, file_name(0)) as file:
        for held in saved.held(0):
            for start, stop in rows_of(held.slice_.shape):
                block = weights.read(held.name, start, stop).contiguous()
                if not torch.isfinite(block).all():
                    raise UserError(f"{weights.where}: {held.name} holds values that are not finite numbers")
                file.write(block.numpy())
    assert file.size == saved.file_size(0), f"{file.size} bytes were written, {saved.file_size(0)} are right"
    body: dict[str, Any] = {
        "step": position.step,
        "samples": position.samples,
        "layout": saved.to_json(),
        "config": {"model": weights.model.model_dump(mode="json")},
        "versions": {"llama_dist": __version__, "torch": torch.__version__},
        "imported": {
            "from": str(Path(weights.where).absolute()),
            "dtype": weights.dtype,
            "files": {path.name: path.stat().st_size for path in weights.files},
        },
        "files": {file_name(0): {"bytes": file.size, "xxh3_128": file.checksum}},
    }
    place.commit(draft, name, seal(body))
