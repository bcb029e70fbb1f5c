"""Weights as a GGUF file, in the names, order of rows and metadata that llama.cpp's converter for LLaMA writes."""

from __future__ import annotations

import importlib
import os
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama_dist.config import ModelConfig
from llama_dist.errors import UserError
from llama_dist.exchange.exporting import cast, raw
from llama_dist.exchange.gguf_vocabulary import Vocabulary, vocabulary_of
from llama_dist.exchange.target import new_file
from llama_dist.exchange.tokenizer_files import TokenizerSource
from llama_dist.exchange.weights import Weights, rows_of
from llama_dist.model.llama import inverse_frequencies

_FILE_TYPES = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}
_KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_ARRAYS = {2: np.dtype(np.uint16), 4: np.dtype(np.uint32)}
ROPE_FACTORS = "rope_freqs.weight"


def export_gguf(weights: Weights, path: str | Path, *, dtype: torch.dtype, tokenizer: TokenizerSource, name: str) -> None:
    """Write one GGUF file at `path`; vectors in float32, matrices in `dtype`, a block of a tensor held at a time.

    Raises UserError where the package gguf is absent, the file is there already or cannot be written, llama.cpp has no
    like of the tokenizer, or a value does not fit `dtype`; nothing is left of the file then.
    """
    gguf = _package()
    vocabulary = vocabulary_of(tokenizer, weights.model.vocab_size)
    with new_file(path) as draft:
        writer = gguf.GGUFWriter(draft, "llama")
        try:
            _add_model(writer, weights.model, name)
            writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[dtype]])
            _add_vocabulary(writer, vocabulary)
            _write_tensors(gguf, writer, weights, dtype)
        finally:
            writer.close()


def _package() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise UserError("--format gguf: needs the package gguf; `pip install 'llama_dist[gguf]'`") from error


def _add_model(writer: Any, model: ModelConfig, name: str) -> None:
    writer.add_name(name)
    writer.add_vocab_size(model.vocab_size)
    writer.add_context_length(model.max_position_embeddings)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(model.num_hidden_layers)
    writer.add_feed_forward_length(model.intermediate_size)
    writer.add_head_count(model.num_attention_heads)
    writer.add_head_count_kv(model.num_key_value_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_layer_norm_rms_eps(model.rms_norm_eps)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_tokenizer_pre(vocabulary.words)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    put = {"bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "unknown": writer.add_unk_token_id}
    for which, number in vocabulary.ids.items():
        put[which](number)
    writer.add_add_bos_token(vocabulary.bos_first)
    writer.add_add_eos_token(False)
    if vocabulary.space_first is not None:
        writer.add_add_space_prefix(vocabulary.space_first)


def _write_tensors(gguf: Any, writer: Any, weights: Weights, dtype: torch.dtype) -> None:
    """The table of tensors, then their data in the same order, each at a multiple of the file's alignment."""
    model, shapes = weights.model, weights.tensors()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.num_hidden_layers)
    factors = rope_factors(model)
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, tuple(factors.shape), np.dtype(np.float32), factors.nbytes)
    for name, shape in shapes.items():
        stored = dtype if len(shape) > 1 else torch.float32
        theirs = names.get_name(name, try_suffixes=(".weight",))
        size = stored.itemsize * prod(shape)
        kind = gguf.GGMLQuantizationType[_KINDS[stored]]
        writer.add_tensor_info(theirs, shape, _ARRAYS[stored.itemsize], size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file = writer.fout[0]
    if factors is not None:
        writer.write_padding(file, file.tell())
        file.write(raw(factors))
    for name, shape in shapes.items():
        stored = dtype if len(shape) > 1 else torch.float32
        writer.write_padding(file, file.tell())
        rotates = name.endswith(("q_proj.weight", "k_proj.weight"))
        for start, stop in rows_of(shape, multiple=model.head_dim if rotates else 1):
            block = weights.read(name, start, stop)
            if rotates:
                block = neighbours_first(block, model.head_dim)
            file.write(raw(cast(block, stored, name)))
    writer.write_padding(file, file.tell())


def neighbours_first(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of whole heads from our order, in which the two halves of a head are rotated, to that of neighbours."""
    heads = rows.view(-1, 2, head_dim // 2, rows.shape[1])
    return heads.transpose(1, 2).reshape(rows.shape)


def rope_factors(model: ModelConfig) -> Tensor | None:
    """By how much each rotation is slowed under LLaMA-3's scaling: (head_dim / 2,) float32; None without one."""
    if model.rope_scaling is None:
        return None
    plain = inverse_frequencies(model.model_copy(update={"rope_scaling": None}))
    return plain / inverse_frequencies(model)
