"""A shard directory in words, for `llama-dist inspect`."""

from __future__ import annotations

from math import log
from pathlib import Path

import numpy as np

from llama_dist.data.shards import Shards
from llama_dist.data.tokenizer import load_tokenizer

SAMPLE_TOKENS = 48
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def describe_shards(path: str | Path, tokenizer: str | Path | None = None) -> str:
    """Counts, sizes, document lengths, unigram entropy and, given a tokenizer file, the beginnings of two documents.

    Raises UserError where the shards or the tokenizer cannot be read.
    """
    shards = Shards(path)
    lines = [f"{path}: {shards.num_tokens:,} tokens in {shards.num_documents:,} documents"]
    manifest = shards.manifest
    if manifest is not None:
        made_by = manifest.tokenizer
        stored = sum(item["bytes"] for item in manifest.files.values())
        nats = manifest.unigram_entropy
        lines += [
            f"  text              {format_bytes(manifest.raw_bytes)}, "
            f"{manifest.raw_bytes / max(1, manifest.tokens):.2f} bytes a token",
            f"  files             {len(manifest.files)}, {format_bytes(stored)}, {manifest.dtype}",
            f"  tokenizer         {made_by['file']}, {made_by['vocab_size']:,} ids, bos {made_by['bos_id']}, "
            f"eos {made_by['eos_id']}, sha256 {made_by['fingerprint'][:12]}",
            f"  unigram entropy   {nats:.4f} nats a token ({nats / log(2):.3f} bits)",
            f"  made by           {manifest.command}",
        ]
    if shards.num_documents:
        values = np.quantile(shards.document_lengths(), QUANTILES, method="nearest")
        names = ("min", *(f"{q:.0%}" for q in QUANTILES[1:-1]), "max")
        lines.append("  document tokens   " + ", ".join(f"{n} {v:,}" for n, v in zip(names, values, strict=True)))
    if tokenizer is not None:
        lines += _samples(shards, tokenizer)
    return "\n".join(lines)


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


def _samples(shards: Shards, path: str | Path) -> list[str]:
    """The first and the middle document, a line each."""
    tokenizer = load_tokenizer(path)
    lines = []
    for i in sorted({0, shards.num_documents // 2} & set(range(shards.num_documents))):
        tokens = shards.document(i)[:SAMPLE_TOKENS].tolist()
        lines.append(f"  document {i:<8} {tokenizer.decode(tokens)!r}")
    return lines
