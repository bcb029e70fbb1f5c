"""A checkpoint's weights as one plain model in one process, for evaluation and generation."""

from __future__ import annotations

from pathlib import Path

from llama_dist.boxes import Box
from llama_dist.checkpoint.pieces import Piece
from llama_dist.checkpoint.places import COMMITTED, MANIFEST
from llama_dist.checkpoint.store import (
    Checkpoint,
    load_pieces,
    newest_valid,
    open_place,
    read_checkpoint,
    verify,
)
from llama_dist.config import RunConfig, build_config
from llama_dist.data.remote import is_url
from llama_dist.data.tokenizer import Tokenizer
from llama_dist.errors import UserError
from llama_dist.model.llama import Llama


def is_checkpoint(path: str | Path) -> bool:
    """Whether a path or URL is named like a checkpoint: step-00000300."""
    return COMMITTED.fullmatch(str(path).rstrip("/").rpartition("/")[2]) is not None


def read_whole(path: str | Path) -> Checkpoint:
    """The checkpoint at this path or URL, every file of it checked. Raises UserError with all that is wrong."""
    try:
        checkpoint = read_at(path)
        problems = verify(checkpoint)
    except ValueError as error:
        problems = [str(error)]
    if problems:
        raise UserError(f"{path}: is damaged: " + "; ".join(problems))
    return checkpoint


def read_at(path: str | Path) -> Checkpoint:
    """The checkpoint at this path or URL. Raises ValueError as `read_checkpoint`."""
    text = str(path) if is_url(str(path)) else str(Path(path).absolute())
    where, _, name = text.rstrip("/").rpartition("/")
    return read_checkpoint(open_place(where), name)


def find_checkpoint(path: str | Path) -> tuple[Checkpoint, list[str]]:
    """The checkpoint that `path` means: a checkpoint, or the newest one that verifies of a run or of a place.

    Also returns what was wrong with newer ones that were passed over. Raises UserError where there is none to use.
    """
    if is_url(str(path)):
        place = open_place(str(path).rstrip("/"))
        if not place.names():
            return read_whole(path), []
    else:
        path = Path(path)
        if not path.is_dir():
            raise UserError(f"{path}: there is no such folder; name a run folder or a checkpoint in its checkpoints/")
        if (path / MANIFEST).is_file():
            return read_whole(path), []
        place = open_place(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    checkpoint, passed_over = newest_valid(place)
    if checkpoint is None:
        raise UserError(f"{path}: holds no checkpoint; a run saves into checkpoints/ while it trains")
    return checkpoint, passed_over


def config_of(checkpoint: Checkpoint) -> RunConfig:
    """The config that the checkpoint was saved under."""
    return build_config(RunConfig, checkpoint.manifest["config"], where=f"{checkpoint}/{MANIFEST}")


def check_tokenizer(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    """Raise UserError where the model was trained on the ids of another tokenizer."""
    trained_on = checkpoint.manifest.get("tokenizer", tokenizer.fingerprint)
    if trained_on != tokenizer.fingerprint:
        raise UserError(
            f"{checkpoint}: was trained with the tokenizer of sha256 {trained_on[:12]}, and this one has "
            f"{tokenizer.fingerprint[:12]}; name the right file with --tokenizer"
        )


def load_model(checkpoint: Checkpoint) -> Llama:
    """The float32 weights of a checkpoint, whatever layout saved it, as a plain model on the CPU."""
    model = Llama(checkpoint.saved.model)
    pieces = []
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        pieces.append(Piece(name, shape, Box((0,) * len(shape), shape), parameter.detach()))
    load_pieces(checkpoint, pieces)
    return model.eval()
