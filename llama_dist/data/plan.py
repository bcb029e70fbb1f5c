"""What shards are made of, and whether what is found on the disk was made of the same."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from llama_dist.data.claims import LOCKS, Claims
from llama_dist.data.files import checksum_of
from llama_dist.data.inputs import Input
from llama_dist.data.manifest import MANIFEST
from llama_dist.data.rows import Reading
from llama_dist.errors import UserError
from llama_dist.files import write_file

PLAN = "PLAN.json"
WHOLE_BYTES = 1 << 30
SAMPLES, SAMPLE_BYTES = 4, 16 << 10
READERS = 16
WAIT_SECONDS = 0.05


@dataclass(frozen=True)
class Plan:
    """All that the bytes of the shards depend on. `inputs` as `identify` tells them."""

    tokenizer: str
    reading: dict[str, Any]
    unit_bytes: int
    pair_tokens: int
    inputs: list[dict[str, Any]]


def identify(inputs: Sequence[Input]) -> list[dict[str, Any]]:
    """File, size and contents of each input: `xxh3_128` of all its bytes, or `sampled_xxh3_128`.

    Where the inputs are more than 1 GiB together, four blocks of 16 KiB evenly spread over a file stand for all of it:
    to read terabytes once more would take as long as the work. Of what is not on this machine's file systems there
    is only the size. Times of change are left out: a copy is the same input.
    """
    whole = sum(item.bytes for item in inputs) <= WHOLE_BYTES
    with ThreadPoolExecutor(READERS) as readers:
        return list(readers.map(partial(_identify, whole=whole), inputs))


def contents(inputs: Sequence[dict[str, Any]]) -> list[tuple[int, str]]:
    """What `identify` found, but for the names of the files; where only the size is known, the name."""
    return [(i["bytes"], i.get("xxh3_128") or i.get("sampled_xxh3_128") or i["file"]) for i in inputs]


def _identify(item: Input, *, whole: bool) -> dict[str, Any]:
    path = Path(item.path)
    if not path.is_file():
        return {"file": item.path, "bytes": item.bytes}
    size = path.stat().st_size
    if whole:
        return {"file": item.path, "bytes": size, "xxh3_128": checksum_of(path)}
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        for i in range(SAMPLES):
            file.seek((size - min(size, SAMPLE_BYTES)) * i // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return {"file": item.path, "bytes": size, "sampled_xxh3_128": digest.hexdigest()}


@contextmanager
def begun(folder: Path, plan: Plan) -> Iterator[Claims]:
    """The claims of a folder that this plan is carried out in; it is made, or was begun with the very same plan.

    Raises UserError where it holds another plan's work, or something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    there = os.listdir(folder)
    if not {PLAN, MANIFEST}.intersection(there) and any(not name.startswith((LOCKS, PLAN)) for name in there):
        raise UserError(f"{folder}: is there and is no work that was begun; remove it, or choose another --out")
    with Claims(folder / LOCKS) as claims:
        while not (claims.be_present() and claims.take_folder()):
            time.sleep(WAIT_SECONDS)  # another process looks at the plan too, or merges
        while not _agreed(folder, plan):
            time.sleep(WAIT_SECONDS)
        claims.release_folder()
        yield claims


def _agreed(folder: Path, plan: Plan) -> bool:
    """Compare the plan with the one that is there, or write it; False where another process was at it."""
    if (folder / PLAN).exists():
        _compare(folder, plan)
    elif not (folder / MANIFEST).exists():  # else all is done, and a kill came just before the folder was renamed
        try:
            write_file(folder / PLAN, json.dumps(asdict(plan)).encode())
        except (FileExistsError, FileNotFoundError):  # without locks two may write it at once
            if not folder.exists():
                raise
            return False
    return True


def _compare(folder: Path, plan: Plan) -> None:
    advice = f"give what it was begun with, or remove {folder} to begin anew"
    try:
        then = Plan(**json.loads((folder / PLAN).read_bytes()))
        contents(then.inputs)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / PLAN}: is damaged ({error}); remove {folder}") from error
    if then.tokenizer != plan.tokenizer:
        raise UserError(f"{folder}: was begun with another tokenizer; {advice}")
    if difference := differing(then.reading, plan.reading):
        raise UserError(f"{folder}: was begun with other settings of reading: {difference}; {advice}")
    if changed := changed_input(then.inputs, plan.inputs):
        raise UserError(f"{folder}: was begun with other inputs: {changed}; {advice}")
    for name in ("unit_bytes", "pair_tokens"):
        before, now = getattr(then, name), getattr(plan, name)
        if before != now:
            raise UserError(f"{folder}: was begun with {name}={before}, not {now}; {advice}")


def changed_input(then: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> str | None:
    """The first difference between inputs, or None."""
    for before, after, old, new in zip(then, now, contents(then), contents(now), strict=False):
        if before["bytes"] != after["bytes"]:
            return f"{after['file']} has {after['bytes']:,} bytes, {before['file']} had {before['bytes']:,}"
        if old != new:
            return f"{after['file']} is not the same {before['file']} as then"
    return f"{len(now):,} of them, {len(then):,} then" if len(now) != len(then) else None


def differing(then: dict[str, Any], now: dict[str, Any]) -> str:
    """Settings of reading that are not the same, in words; those that are not told are the usual ones."""
    usual = asdict(Reading())
    pairs = {name: (then.get(name, default), now.get(name, default)) for name, default in usual.items()}
    return ", ".join(f"{name} {old!r} then, {new!r} now" for name, (old, new) in pairs.items() if old != new)
