"""A shard directory in words, for `llama-dist inspect`."""

from __future__ import annotations

from math import log
from pathlib import Path

import numpy as np

from llama_dist.data.manifest import Manifest
from llama_dist.data.shards import Shards
from llama_dist.data.tokenizer import fingerprint_of, load_tokenizer
from llama_dist.data.words import counted
from llama_dist.errors import UserError

SAMPLE_TOKENS = 48
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
BAR = 30  # characters of the longest one


def describe_shards(path: str | Path, tokenizer: str | Path | None = None) -> str:
    """Counts, sizes, document lengths, unigram entropy and the beginnings of two documents.

    They are decoded by `tokenizer`, or by the file that made the shards where that is still there. Raises UserError
    where the shards or the tokenizer cannot be read.
    """
    shards = Shards(path)
    lines = [f"{path}: {counted(shards.num_tokens, 'token')} in {counted(shards.num_documents, 'document')}"]
    if shards.manifest is not None:
        lines += _of_manifest(shards.manifest)
    else:
        size = shards.num_tokens * shards.dtype.itemsize
        lines.append(f"  files             a Megatron pair, {format_bytes(size)} of tokens, {shards.dtype}")
    if shards.num_documents:
        lines += _of_lengths(shards)
    return "\n".join(lines + _samples(shards, tokenizer))


def _of_manifest(manifest: Manifest) -> list[str]:
    made_by, nats = manifest.tokenizer, manifest.unigram_entropy
    stored = sum(item["bytes"] for item in manifest.files.values())
    skipped = ", ".join(f"{count:,} {kind}" for kind, count in sorted(manifest.skipped.items()))
    return [
        f"  text              {format_bytes(manifest.raw_bytes)}, "
        f"{manifest.raw_bytes / max(1, manifest.tokens):.2f} bytes a token",
        f"  files             {len(manifest.files)}, {format_bytes(stored)}, {manifest.dtype}",
        f"  skipped           {skipped or 'nothing'}",
        f"  tokenizer         {made_by['file']}, {made_by['vocab_size']:,} ids, bos {made_by['bos_id']}, "
        f"eos {made_by['eos_id']}, sha256 {made_by['fingerprint'][:12]}",
        f"  unigram entropy   {nats:.4f} nats a token ({nats / log(2):.3f} bits)",
        f"  made by           {manifest.command}",
    ]


def _of_lengths(shards: Shards) -> list[str]:
    """Quantiles and a histogram of the documents' lengths: of each octave its documents and share of the tokens."""
    lengths, counts = _count_lengths(shards)
    ends = np.cumsum(counts)
    places = [round(q * (shards.num_documents - 1)) for q in QUANTILES]
    values = lengths[np.searchsorted(ends, places, side="right")]
    names = ("min", *(f"{q:.0%}" for q in QUANTILES[1:-1]), "max")
    lines = ["  document tokens   " + ", ".join(f"{n} {v:,}" for n, v in zip(names, values, strict=True))]
    octaves = np.where(lengths > 0, np.log2(np.maximum(lengths, 1)).astype(int) + 1, 0)
    documents = np.bincount(octaves, weights=counts)
    tokens = np.bincount(octaves, weights=counts * lengths)
    width = len(_octave(len(documents) - 1))
    for octave in range(int(octaves.min()), len(documents)):
        bar = "#" * int(np.ceil(BAR * documents[octave] / documents.max()))
        share = tokens[octave] / max(1, tokens.sum())
        lines.append(
            f"    {_octave(octave):>{width}}  {bar:<{BAR}}  {counted(int(documents[octave]), 'document')}, "
            f"{share:.1%} of the tokens"
        )
    return lines


def _count_lengths(shards: Shards) -> tuple[np.ndarray, np.ndarray]:
    """The lengths that occur, rising, and how many documents have each; there are far fewer than documents."""
    lengths, counts = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    for of_pair in shards.lengths_by_pair():
        more, more_counts = np.unique(of_pair, return_counts=True)
        lengths, places = np.unique(np.concatenate([lengths, more]), return_inverse=True)
        counts = np.bincount(places, weights=np.concatenate([counts, more_counts])).astype(np.int64)
    return lengths, counts


def _octave(number: int) -> str:
    """0; 1; 2-3; 4-7; ..."""
    if number < 2:
        return str(number)
    return f"{1 << number - 1:,}-{(1 << number) - 1:,}"


def format_bytes(count: int) -> str:
    """A number of bytes for people: 12 bytes, 3.4 kB, 5.6 MB."""
    if count < 1000:
        return f"{count} bytes"
    value = float(count)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 1000:
            return f"{value:.1f} {unit}"
    return f"{value / 1000:.1f} TB"


def _samples(shards: Shards, path: str | Path | None) -> list[str]:
    """The first and the middle document, a line each; or why they cannot be shown."""
    made_by = shards.manifest.tokenizer if shards.manifest is not None else None
    if path is None:
        if made_by is None:
            return ["  samples           name the tokenizer by --tokenizer to see some"]
        path = made_by["file"]
        if not _is_the_one(path, made_by["fingerprint"]):
            return [f"  samples           {path} is not there, or another by now; name the tokenizer by --tokenizer"]
    tokenizer = load_tokenizer(path)
    lines = []
    if made_by is not None and tokenizer.fingerprint != made_by["fingerprint"]:
        lines.append(f"  samples           decoded by {path}, which is not what made them")
    for i in sorted({0, shards.num_documents // 2}) if shards.num_documents else ():
        start, stop = shards.document_span(i)
        tokens = shards.tokens(start, min(stop, start + SAMPLE_TOKENS)).tolist()
        if tokens and not 0 <= min(tokens) <= max(tokens) < tokenizer.vocab_size:
            raise UserError(
                f"{shards.path}: document {i} has ids from {min(tokens)} to {max(tokens)}, and {path} knows "
                f"{tokenizer.vocab_size}; the shards are damaged, or are another tokenizer's"
            )
        lines.append(f"  document {i:<8} {tokenizer.decode(tokens)!r}")
    return lines


def _is_the_one(path: str, fingerprint: str) -> bool:
    try:
        return fingerprint_of(path) == fingerprint
    except UserError:
        return False
