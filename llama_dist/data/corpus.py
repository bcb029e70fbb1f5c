"""Real text that every machine with Python has: the standard library's language reference, docstrings and sources."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from llama_dist.data.choices import make_choices
from llama_dist.data.documents import Document
from llama_dist.data.files import checksum_of, is_free, new_folder
from llama_dist.data.stdlib import Unit, list_units
from llama_dist.errors import UserError
from llama_dist.files import write_file

MAX_BYTES = 8_000_000
HELDOUT_FRACTION = 0.05
MIN_HELDOUT_UNITS = 4
MIN_BYTES = 100_000
TOPICS_SHARE = 0.25
LONG_LINE = 30
MAX_OVERLAP = 0.1
NUM_CHOICES = 200
RECIPE = "python standard library v1"
MANIFEST = "MANIFEST.json"


@dataclass(frozen=True)
class Corpus:
    """What was gathered: the numbers of MANIFEST.json, and whether it was there already."""

    manifest: dict[str, Any]
    already_there: bool


def gather_corpus(
    out: str | Path, *, max_bytes: int = MAX_BYTES, heldout_fraction: float = HELDOUT_FRACTION
) -> Corpus:
    """Write train.jsonl, heldout.jsonl, choices.jsonl and MANIFEST.json into the new folder `out`.

    At most `max_bytes` of text, the same for the same interpreter version. A module's docstrings and source are one
    unit, a unit is wholly in train or wholly held out, and one whose lines stand elsewhere too is never held out.
    Raises UserError where this Python has too little text, and where `out` holds anything else.
    """
    out = Path(out)
    if max_bytes < MIN_BYTES:
        raise UserError(f"max_bytes={max_bytes}: is too little for a corpus; use at least {MIN_BYTES}")
    if not 0 < heldout_fraction < 0.5:
        raise UserError(f"heldout_fraction={heldout_fraction}: must lie between 0 and 0.5; 0.05 is usual")
    recipe = {
        "recipe": RECIPE,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "max_bytes": max_bytes,
        "heldout_fraction": heldout_fraction,
    }
    if not is_free(out):
        return Corpus(_finished(out, recipe), already_there=True)

    units = select_units(list_units(), max_bytes=max_bytes)
    train, heldout = split_units(units, heldout_fraction=heldout_fraction)
    if not heldout or _size(train) < MIN_BYTES / 2:
        raise UserError(
            f"corpus: this Python has only {_size(units)} bytes of text in its standard library; "
            "install a full Python, or give your own text to `llama-dist prepare`"
        )
    choices = make_choices(_kinds(heldout), _kinds(train), count=NUM_CHOICES)
    with new_folder(out) as folder:
        _write_lines(folder / "train.jsonl", _rows(train))
        _write_lines(folder / "heldout.jsonl", _rows(heldout))
        _write_lines(folder / "choices.jsonl", choices)
        manifest = {
            **recipe,
            "train": _counts(train),
            "heldout": _counts(heldout),
            "choices": len(choices),
            "files": {
                file.name: {"bytes": file.stat().st_size, "xxh3_128": checksum_of(file)}
                for file in sorted(folder.iterdir())
            },
        }
        write_file(folder / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    return Corpus(manifest, already_there=False)


def select_units(units: Iterable[Unit], *, max_bytes: int) -> list[Unit]:
    """As many units as fit, in the order of their hashes, so that a small corpus is as mixed as a large one.

    Texts that stand there already are left out; the reference may take a quarter of the room.
    """
    room = {"topics": int(max_bytes * TOPICS_SHARE), "all": max_bytes}
    seen: set[str] = set()
    selected = []
    for unit in sorted(units, key=lambda unit: hash_of(unit.name)):
        if unit.hint_bytes > room["all"]:
            continue
        documents = tuple(d for d in unit.read() if d.text not in seen)
        full = Unit(unit.name, unit.kind, documents=documents)
        size = _size([full])
        limits = ("topics", "all") if unit.kind == "topics" else ("all",)
        if documents and all(size <= room[limit] for limit in limits):
            seen.update(d.text for d in documents)
            selected.append(full)
            for limit in limits:
                room[limit] -= size
    return selected


def split_units(units: Sequence[Unit], *, heldout_fraction: float) -> tuple[list[Unit], list[Unit]]:
    """(train, held out): of each kind, the units of the lowest hashes that share few lines with the rest."""
    count: Counter[str] = Counter()
    for unit in units:
        count.update(long_lines(unit))
    heldout = []
    for kind in sorted({unit.kind for unit in units}):
        same = [unit for unit in units if unit.kind == kind]
        wanted, held = heldout_fraction * _size(same), 0
        at_least = min(MIN_HELDOUT_UNITS, len(same) // 3)
        taken: list[Unit] = []
        for unit in sorted(same, key=lambda unit: hash_of("split:" + unit.name)):
            if held >= wanted and len(taken) >= at_least:
                break
            # One huge module must not be the whole held-out part.
            if _overlap(unit, count) <= MAX_OVERLAP and _size([unit]) <= max(wanted / 4, 20_000):
                taken.append(unit)
                held += _size([unit])
        heldout += taken
    names = {unit.name for unit in heldout}
    return [unit for unit in units if unit.name not in names], heldout


def long_lines(unit: Unit) -> set[str]:
    """The lines of a unit that are long enough to tell it from others."""
    lines = (line.strip() for document in unit.documents for line in document.text.split("\n"))
    return {line for line in lines if len(line) >= LONG_LINE}


def hash_of(name: str) -> int:
    """A fixed pseudo-random number of a name."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")


def _overlap(unit: Unit, count: Counter[str]) -> float:
    """The part of a unit's long lines that stand in other units too."""
    lines = long_lines(unit)
    return sum(count[line] > 1 for line in lines) / len(lines) if lines else 1.0


def _size(units: Iterable[Unit]) -> int:
    return sum(len(document.text.encode()) for unit in units for document in unit.documents)


def _kinds(units: Iterable[Unit]) -> dict[str, list[Document]]:
    """Documents by what they look like: topics, docstrings or source; the id begins with it."""
    kinds: dict[str, list[Document]] = {}
    for document in _rows_sorted(units):
        kinds.setdefault(document.id.split("/", 1)[0], []).append(document)
    return kinds


def _rows_sorted(units: Iterable[Unit]) -> list[Document]:
    """In the order of hashes: a prefix of the file is a fair part of the corpus."""
    return sorted((d for unit in units for d in unit.documents), key=lambda d: hash_of(d.id))


def _rows(units: Iterable[Unit]) -> list[dict[str, Any]]:
    return [{"id": document.id, "text": document.text} for document in _rows_sorted(units)]


def _counts(units: Iterable[Unit]) -> dict[str, dict[str, int]]:
    return {
        kind: {"documents": len(documents), "bytes": sum(len(d.text.encode()) for d in documents)}
        for kind, documents in sorted(_kinds(units).items())
    }


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def _finished(out: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """The manifest in `out`, where it is that of the same recipe."""
    advice = "remove it first, or choose another folder"
    try:
        found: dict[str, Any] = json.loads((out / MANIFEST).read_bytes())
        same = all(found.get(key) == value for key, value in recipe.items())
        whole = same and all((out / name).stat().st_size == f["bytes"] for name, f in found["files"].items())
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{out}: is there and is not a whole corpus; {advice}") from error
    if not same:
        raise UserError(f"{out}: holds a corpus of another Python or of other settings; {advice}")
    if not whole:
        raise UserError(f"{out}: a file has another size than {MANIFEST} says; {advice}")
    return found
