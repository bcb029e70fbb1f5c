"""Finished units -> one shard directory."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import xxhash

from llama_dist.data.inputs import Input
from llama_dist.data.manifest import MANIFEST, Manifest
from llama_dist.data.megatron import dtype_for
from llama_dist.data.plan import Plan, changed_input, contents, identify
from llama_dist.data.shard_writer import unigram_entropy
from llama_dist.data.shards import load_manifest
from llama_dist.data.skips import Tally, list_skipped, write_lines
from llama_dist.data.tokenizer import Tokenizer
from llama_dist.data.units import COUNTS, SKIPPED, Record, Unit
from llama_dist.errors import UserError
from llama_dist.files import sync_folder, write_file

MAX_INPUTS = 1000
INPUTS = "inputs.jsonl"


def merge(
    folder: Path, *, inputs: Sequence[Input], units: list[Unit], tally: Tally, plan: Plan, tokenizer: Tokenizer,
    tokenizer_path: str, command: str,
) -> None:  # fmt: skip
    """Make the finished units of a folder a shard directory, whose MANIFEST.json comes last.

    Files are moved and nothing is read again, so this takes seconds for any amount; a kill at any point leaves what
    the next call goes on from. The caller holds the claim of the folder. Raises UserError where no document came, or
    the inputs are not what they were when the work was begun.
    """
    if changed := changed_input(plan.inputs, identify(inputs)):
        raise UserError(f"{changed}: it changed while it was read; remove {folder} and prepare again")
    if not tally.documents:
        names = ", ".join(item.path for item in inputs[:3]) + (", ..." if len(inputs) > 3 else "")
        raise UserError(f"{names}: no documents with text; give at least one file that has some")
    counts = _sum_of_counts(folder, units, tokenizer.vocab_size)
    files = _move_pairs(folder, units, tally.records)
    if tally.faults:
        files[SKIPPED] = _write_lines(folder / SKIPPED, list_skipped(folder, units))
    told = plan.inputs
    if len(told) > MAX_INPUTS:
        files[INPUTS] = _write_lines(folder / INPUTS, [json.dumps(item) for item in told])
        told = [summary(told)]
    made_by = {
        "file": tokenizer_path,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
    }
    manifest = Manifest(
        tokens=sum(record.tokens for record in tally.records),
        documents=tally.documents,
        raw_bytes=sum(record.raw_bytes for record in tally.records),
        unigram_entropy=unigram_entropy(counts),
        dtype=dtype_for(tokenizer.vocab_size).name,  # type: ignore[arg-type]
        tokenizer=made_by,  # type: ignore[arg-type]
        inputs=told,
        files=files,  # type: ignore[arg-type]
        command=command,
        reading=plan.reading,
        skipped=dict(sorted(tally.skipped.items())),
    )
    write_file(folder / MANIFEST, manifest.to_json())


def publish(folder: Path, out: Path) -> Manifest:
    """Rid a folder that has its MANIFEST.json of all that was needed to make it, and rename it to `out`."""
    manifest = load_manifest(folder)
    for entry in os.scandir(folder):
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != MANIFEST and entry.name not in manifest.files:
            Path(entry).unlink(missing_ok=True)
    sync_folder(folder)
    os.replace(folder, out)
    sync_folder(out.parent)
    return manifest


def summary(inputs: list[dict[str, Any]]) -> dict[str, Any]:
    """What MANIFEST.json tells of so many inputs that their list is a file of its own: it is read at each start."""
    digest = xxhash.xxh3_128(json.dumps(contents(inputs)).encode()).hexdigest()
    return {"file": INPUTS, "inputs": len(inputs), "bytes": sum(i["bytes"] for i in inputs), "xxh3_128": digest}


def _sum_of_counts(folder: Path, units: list[Unit], vocab_size: int) -> np.ndarray:
    counts = np.zeros(vocab_size, dtype=np.int64)
    for unit in units:
        file = folder / unit.name / COUNTS
        try:
            with np.load(file) as found:
                counts += found["counts"]
        except (OSError, EOFError, ValueError, KeyError, BadZipFile, zlib.error) as error:
            raise UserError(f"{file}: is damaged ({error}); remove {file.parent} and prepare again") from error
    return counts


def _move_pairs(folder: Path, units: list[Unit], records: list[Record]) -> dict[str, dict[str, Any]]:
    """Number the pairs of all units through; those that were moved before a kill are there already."""
    files: dict[str, dict[str, Any]] = {}
    for unit, record in zip(units, records, strict=True):
        first = sum(name.endswith(".bin") for name in files)
        for name, entry in record.files.items():
            pair, suffix = name.split(".")
            target = f"{first + int(pair):05d}.{suffix}"
            source = folder / unit.name / name
            if source.exists():
                os.replace(source, folder / target)
            found = (folder / target).stat().st_size if (folder / target).exists() else None
            if found != entry["bytes"]:
                raise UserError(
                    f"{folder / target}: has {found} bytes, expected {entry['bytes']}; it was changed since it was "
                    f"written; remove {folder} and prepare again"
                )
            files[target] = entry
    return files


def _write_lines(path: Path, lines: list[str]) -> dict[str, Any]:
    file = write_lines(path, lines)
    return {"bytes": file.size, "xxh3_128": file.checksum}
