"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama_dist.data.remote import is_url
from llama_dist.errors import UserError
from llama_dist.files import sync_folder


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` when the block ends, and is deleted where it ends with an error.

    Raises UserError where `path` is there and not empty, or cannot be written to: a full disk among other things.
    """
    path = check_target(path)
    draft = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        draft.mkdir(parents=True)
        yield draft
        for folder, _, _ in os.walk(draft):
            sync_folder(Path(folder))
        os.rename(draft, path)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"{path}: could not be written: {error.strerror or error}; what was begun is deleted") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)  # after the rename there is none


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """The same for a file."""
    path = Path(path).absolute()
    if path.exists():
        raise UserError(f"{path}: is there already; name another file, or delete it first")
    draft = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        sync_file(draft)
        os.rename(draft, path)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"{path}: could not be written: {error.strerror or error}; what was begun is deleted") from error
    finally:
        draft.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Flush a file that a library wrote."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def check_target(path: str | Path) -> Path:
    """The absolute path of a folder that is to be made. Raises UserError where there is something already."""
    if is_url(str(path)):
        raise UserError(f"{path}: must be a folder of this machine, not a URL; copy it there afterwards")
    path = Path(path).absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: is there already, and is not an empty folder; name another, or delete it first")
    return path
