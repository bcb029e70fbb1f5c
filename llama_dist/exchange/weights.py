"""Weights wherever they come from, as logical tensors that are read by rows: a checkpoint, Hugging Face's, Meta's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from llama_dist.boxes import Box
from llama_dist.checkpoint.pieces import Piece
from llama_dist.checkpoint.plan import split_name
from llama_dist.checkpoint.store import Checkpoint, load_pieces
from llama_dist.checkpoint.whole import find_checkpoint, is_checkpoint
from llama_dist.config import ModelConfig
from llama_dist.data.remote import is_url
from llama_dist.errors import UserError
from llama_dist.exchange.meta import PARAMS, MetaWeights
from llama_dist.model.hf import HuggingFaceWeights

BLOCK = 8 << 20  # elements that are held at a time: 32 MiB of float32


class Weights(Protocol):
    """Logical tensors that are read a few rows at a time. `where`: path or URL, for messages."""

    where: str
    model: ModelConfig

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor, in model order."""
        ...

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor (of a vector: elements), float32 on the CPU. Raises UserError."""
        ...


class CheckpointWeights:
    """A checkpoint that any layout wrote: its weights, and of the other `states` what it has."""

    def __init__(self, checkpoint: Checkpoint, states: Sequence[str] = ("",)) -> None:
        self.checkpoint = checkpoint
        self.where = str(checkpoint)
        self.model = checkpoint.saved.model
        self._tensors = {
            name: shape for name, shape in checkpoint.saved.tensors() if split_name(name)[0] in states
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor, in model order."""
        return self._tensors

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, float32. Raises UserError where the storage fails."""
        shape = self._tensors[name]
        box = Box((start,) + (0,) * (len(shape) - 1), (stop - start, *shape[1:]))
        data = torch.empty(box.shape)
        load_pieces(self.checkpoint, [Piece(name, shape, box, data)])
        return data


def open_weights(path: str | Path, states: Sequence[str] = ("",)) -> tuple[Weights, list[str]]:
    """The weights at `path`: a run, a checkpoint (also behind a URL), or a folder of Hugging Face's or Meta's.

    Also returns what was wrong with newer checkpoints of a run that were passed over. Raises UserError where there is
    nothing to use.
    """
    if not is_url(str(path)) and not is_checkpoint(path):
        folder = Path(path)
        if (folder / "config.json").is_file():
            return HuggingFaceWeights(folder), []
        if (folder / PARAMS).is_file():
            return MetaWeights(folder), []
        _refuse_foreign(folder)
    checkpoint, passed_over = find_checkpoint(path)
    return CheckpointWeights(checkpoint, states), passed_over


def open_foreign(path: str | Path) -> HuggingFaceWeights | MetaWeights:
    """The weights to import from a folder. Raises UserError where they are of no kind that can be read."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{path}: there is no such folder; name one with config.json and safetensors files")
    if (folder / PARAMS).is_file() and not (folder / "config.json").is_file():
        return MetaWeights(folder)
    _refuse_foreign(folder)
    if (folder / "config.yaml").is_file() or (folder / "checkpoints").is_dir() or is_checkpoint(path):
        raise UserError(f"{path}: is a run or a checkpoint of ours; it needs no import, `folder` can name it as it is")
    return HuggingFaceWeights(folder)


def _refuse_foreign(folder: Path) -> None:
    """Raise UserError for checkpoints that only their own programs can read without running what is in them."""
    if (folder / "config.json").is_file():
        return
    if any((folder / name).exists() for name in ("zero_to_fp32.py", "latest")) or any(
        folder.glob("*mp_rank_*_model_states.pt")
    ):
        raise UserError(
            f"{folder}: is a checkpoint of DeepSpeed, whose files are pickles that can run code on loading; convert it "
            f"where you trust it: `python {folder}/zero_to_fp32.py {folder} OUT`, put the model's "
            "config.json and tokenizer into OUT, and import OUT"
        )
    if (folder / "latest_checkpointed_iteration.txt").is_file() or any(folder.glob("*/model_optim_rng.pt")):
        raise UserError(
            f"{folder}: is a checkpoint of Megatron-LM, whose files are pickles that can run code on loading; export it "
            "to a Hugging Face folder with Megatron's own tools, and import that"
        )


def rows_of(shape: tuple[int, ...], *, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Cut the rows of a tensor into ranges of about BLOCK elements, each but the last a multiple of `multiple` rows."""
    step = max(1, BLOCK // (prod(shape[1:]) * multiple)) * multiple
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])
