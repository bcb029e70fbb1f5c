"""Weights as a Hugging Face folder: safetensors written a block at a time, config, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_dist.errors import UserError
from llama_dist.exchange.target import new_folder
from llama_dist.exchange.tokenizer_files import TokenizerSource, write_tokenizer
from llama_dist.exchange.weights import Weights, rows_of
from llama_dist.files import HashingFile, write_file
from llama_dist.model.hf import hf_config

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_RAW = {2: torch.int16, 4: torch.int32}  # bytes of a number -> what NumPy takes it for, having no bfloat16


def export_weights(
    weights: Weights,
    folder: str | Path,
    *,
    dtype: torch.dtype,
    shard_bytes: int,
    tokenizer: TokenizerSource | None,
) -> list[str]:
    """Write a folder that Transformers loads as a LlamaForCausalLM without code of its own; returns the weights' files.

    Each safetensors file has about `shard_bytes` at most (a larger tensor has one of its own). No more than a block of
    a tensor is held at a time. Raises UserError where the folder is there already or cannot be written to, and for
    values that `dtype` cannot hold; nothing is left of it then.
    """
    shards = split_tensors(weights.tensors(), itemsize=dtype.itemsize, shard_bytes=shard_bytes)
    names = [SINGLE] if len(shards) == 1 else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    with new_folder(folder) as draft:
        if tokenizer is not None:
            write_tokenizer(tokenizer, draft, max_length=weights.model.max_position_embeddings)
        for name, shard in zip(names, shards, strict=True):
            write_safetensors(draft / name, weights, shard, dtype)
        if len(shards) > 1:
            _write_json(draft / INDEX, _index(names, shards, weights.tensors(), dtype.itemsize))
        bos_id = tokenizer.tokenizer.bos_id if tokenizer else None
        eos_id = tokenizer.tokenizer.eos_id if tokenizer else None
        config = hf_config(weights.model, dtype=str(dtype).removeprefix("torch."), bos_id=bos_id, eos_id=eos_id)
        _write_json(draft / "config.json", config)
        if not (draft / "generation_config.json").exists():
            ids = {"bos_token_id": bos_id, "eos_token_id": eos_id}
            _write_json(draft / "generation_config.json", {k: v for k, v in ids.items() if v is not None})
    return names


def split_tensors(shapes: Mapping[str, tuple[int, ...]], *, itemsize: int, shard_bytes: int) -> list[list[str]]:
    """Names of tensors in order, cut into shards of `shard_bytes` at most, but for a larger tensor alone."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        size = itemsize * prod(shape)
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def write_safetensors(path: Path, weights: Weights, names: Sequence[str], dtype: torch.dtype) -> None:
    """One file: the length of a JSON header, the header, and the tensors one after another, as safetensors has it."""
    shapes, header, at = weights.tensors(), {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        end = at + dtype.itemsize * prod(shapes[name])
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shapes[name]), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    with HashingFile(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for start, stop in rows_of(shapes[name]):
                file.write(raw(cast(weights.read(name, start, stop), dtype, name)))


def cast(block: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A float32 block in another type. Raises UserError where a value does not fit into it."""
    out = block.to(dtype)
    if not torch.isfinite(out).all():
        largest = float(block.abs().max())
        raise UserError(
            f"{name}: its largest value, {largest:g}, does not fit {str(dtype).removeprefix('torch.')} (up to "
            f"{torch.finfo(dtype).max:g}); take another --dtype"
        )
    return out


def raw(block: Tensor) -> Any:
    """The bytes of a tensor, row-major, as an array."""
    return block.contiguous().view(_RAW[block.itemsize]).numpy()


def _index(
    names: Sequence[str], shards: Sequence[Sequence[str]], shapes: Mapping[str, tuple[int, ...]], itemsize: int
) -> dict[str, Any]:
    places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    parameters = sum(map(prod, shapes.values()))
    return {"metadata": {"total_parameters": parameters, "total_size": itemsize * parameters}, "weight_map": places}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())
