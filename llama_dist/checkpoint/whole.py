"""A checkpoint's weights as one plain model in one process, for evaluation and generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llama_dist.boxes import Box
from llama_dist.checkpoint.pieces import Piece
from llama_dist.checkpoint.places import COMMITTED, MANIFEST, Place
from llama_dist.checkpoint.store import (
    Checkpoint,
    load_pieces,
    newest_valid,
    open_place,
    read_checkpoint,
    verify,
)
from llama_dist.config import RunConfig, build_config, load_config
from llama_dist.data.remote import is_url
from llama_dist.data.tokenizer import Tokenizer
from llama_dist.errors import UserError
from llama_dist.model.llama import Llama

LONGEST_MEASURED = 4096  # tokens of a sequence when imported weights are measured: some models take 131,072

def is_checkpoint(path: str | Path) -> bool:
    """Whether a path or URL is named like a checkpoint: step-00000300."""
    return COMMITTED.fullmatch(str(path).rstrip("/").rpartition("/")[2]) is not None


def read_whole(path: str | Path, *, full: bool = True) -> Checkpoint:
    """The checkpoint at this path or URL, every file checked (its checksum only if `full`).

    Raises UserError with all that is wrong.
    """
    try:
        checkpoint = read_at(path)
        problems = verify(checkpoint, full=full)
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


def problems_of(place: Place, name: str, *, full: bool = True) -> list[str]:
    """What is wrong with a checkpoint: its manifest, the sizes of its files and, if `full`, their checksums."""
    try:
        return verify(read_checkpoint(place, name), full=full)
    except ValueError as error:
        return [str(error)]


def checkpoints_at(path: str | Path) -> tuple[Place, list[str]]:
    """Where the checkpoints of a run or a place are kept, and their names, newest first: none where it is neither."""
    if not is_url(str(path)) and not Path(path).is_dir():
        return open_place(path), []
    try:
        place = place_at(path)
        return place, place.names()
    except (UserError, OSError):
        if is_url(str(path)):
            return open_place("."), []  # on a web server are shards, and no checkpoints
        raise


def place_at(path: str | Path) -> Place:
    """Where the checkpoints of a run folder, of weights that were imported, or of such a place itself are kept.

    Raises UserError where there is no such folder.
    """
    if is_url(str(path)):
        url = str(path).rstrip("/")
        place = open_place(url)
        return place if place.names() else open_place(f"{url}/checkpoints")
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: there is no such folder; name a run folder or a checkpoint in its checkpoints/")
    if (path / "config.yaml").is_file():
        elsewhere = load_config(path / "config.yaml").checkpoint.folder
        if elsewhere:
            return open_place(elsewhere)
    return open_place(path / "checkpoints" if (path / "checkpoints").is_dir() else path)


def find_checkpoint(path: str | Path) -> tuple[Checkpoint, list[str]]:
    """The checkpoint that `path` means: a checkpoint, or the newest one that verifies of a run or of a place.

    Also returns what was wrong with newer ones that were passed over. Raises UserError where there is none to use.
    """
    if is_checkpoint(path) or (not is_url(str(path)) and (Path(path) / MANIFEST).is_file()):
        if not is_url(str(path)) and not Path(path).is_dir():
            raise UserError(f"{path}: there is no such folder; name a run folder or a checkpoint in its checkpoints/")
        return read_whole(path), []
    place = place_at(path)
    checkpoint, passed_over = newest_valid(place)
    if checkpoint is None:
        raise UserError(f"{path}: holds no checkpoint; a run saves into checkpoints/ while it trains")
    return checkpoint, passed_over


def is_imported(checkpoint: Checkpoint) -> bool:
    """Whether these are weights from elsewhere: no run saved them, and of a config they have the model alone."""
    return "imported" in checkpoint.manifest


def config_of(checkpoint: Checkpoint) -> RunConfig:
    """The config that the checkpoint was saved under.

    For imported weights one to measure them with: the tokenizer that was imported with them, and no data.
    """
    values = checkpoint.manifest["config"]
    if is_imported(checkpoint):
        values = _stand_in(values["model"], tokenizer=checkpoint.place.where.rpartition("/")[0] or ".")
    return build_config(RunConfig, values, where=f"{checkpoint}/{MANIFEST}")


def _stand_in(model: dict[str, Any], *, tokenizer: str) -> dict[str, Any]:
    data = {
        "tokenizer": tokenizer,
        "train": [{"shards": "none"}],
        "seq_len": min(model["max_position_embeddings"], LONGEST_MEASURED),
    }
    optim, train = {"lr": 1e-5}, {"steps": 1, "global_batch": 1}
    return {"name": "imported", "model": model, "data": data, "optim": optim, "train": train}


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
