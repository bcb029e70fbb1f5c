"""LLaMA-2/3 in plain torch, without parallel code: read it from top to bottom.

A caller may swap modules for ones that hold a slice, `Attention.attend` for one that sees more of the sequence, and
`Linear.multiply`: head counts are read off the tensors that flow, and every weight is touched only by calling its
module (ZeRO-3 gathers on that call). Submodules carry Hugging Face's names, so a parameter's name is its logical name
on any slice of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llama_dist.config import ModelConfig


# For each row of a batch, the positions of the whole sequence at which a document begins: ascending, the first is 0.
Documents = tuple[tuple[int, ...], ...]


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., in) times weight (out, in): (..., out)."""
    return F.linear(x, weight)


class Linear(nn.Linear):
    """A linear map without bias whose weight is left unset: model/init.py or a checkpoint fills it."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.multiply: Callable[[Tensor, Tensor], Tensor] = linear

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.weight)


def look_up(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of weight (vocab, hidden) by ids (...): (..., hidden)."""
    return F.embedding(ids, weight)


class Embedding(nn.Embedding):
    """A token embedding whose weight is left unset."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__(rows, columns)
        self.look_up: Callable[[Tensor, Tensor], Tensor] = look_up

    def reset_parameters(self) -> None:
        pass

    def forward(self, ids: Tensor) -> Tensor:
        return self.look_up(ids, self.weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square normalisation over the last dimension, in float32 (Zhang and Sennrich 2019)."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight


class RMSNorm(nn.Module):
    """`rms_norm` with its weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Rotation in radians per position for each pair of head dimensions: (head_dim / 2,) float32 on the CPU.

    RoFormer section 3.4.2; with `rope_scaling`, LLaMA-3's stretching of the slow rotations (Llama 3 section 3.2).
    Always on the CPU: a device's float32 power is a few ulp off, which thousands of positions would multiply.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    # How often each rotation turned over the context that the model was first trained on.
    turns = scaling.original_max_position_embeddings / (2 * math.pi / frequencies)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def rotary_tables(config: ModelConfig, *, start: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines for positions [start, start + length): two of shape (length, head_dim), float32."""
    positions = torch.arange(start, start + length, dtype=torch.float32, device=device)
    angles = positions[:, None] * inverse_frequencies(config).to(device)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn (batch, heads, T, head_dim) by position; dimension i pairs with i + head_dim / 2, as Hugging Face has it."""
    wide = x.float()
    left, right = wide.chunk(2, dim=-1)
    turned = torch.cat((-right, left), dim=-1)
    return (wide * cos + turned * sin).to(x.dtype)


class Cache:
    """Keys and values of all earlier positions, for generation: each layer's two (batch, kv_heads, length, head_dim).

    A layer's tensors are allocated whole at its first call: only then are its local head count and dtype known,
    under tensor parallelism and ZeRO-3 alike.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, key: Tensor, value: Tensor, *, start: int) -> tuple[Tensor, Tensor]:
        """Write (batch, kv_heads, T, head_dim) at position `start`; returns everything up to there, T included."""
        stop = start + key.shape[2]
        assert stop <= self.length, f"position {stop} does not fit a cache of {self.length} positions"
        if layer not in self._layers:
            batch, heads, _, head_dim = key.shape
            shape = (batch, heads, self.length, head_dim)
            self._layers[layer] = (key.new_empty(shape), value.new_empty(shape))
        keys, values = self._layers[layer]
        keys[:, :, start:stop] = key
        values[:, :, start:stop] = value
        return keys[:, :, :stop], values[:, :, :stop]


@dataclass(frozen=True)
class Places:
    """Where the positions of a batch lie in their sequences, and what they may see."""

    rotary: tuple[Tensor, Tensor]  # of rotary_tables, for exactly the positions that attention's inputs have
    start: int = 0
    cache: Cache | None = None
    documents: Documents | None = None


def causal_attention(query: Tensor, key: Tensor, value: Tensor, documents: Documents | None = None) -> Tensor:
    """Grouped-query attention of the last T positions over all S >= T: (batch, heads, T, head_dim).

    With `documents` (whole sequences only, T = S), a position sees the earlier positions of its own document.
    """
    new, total = query.shape[2], key.shape[2]
    if documents is not None:
        return _attention_within(documents, query, key, value)
    mask = None
    if 1 < new < total:  # is_causal would align the triangle with the first position, not the last
        mask = torch.ones(new, total, dtype=torch.bool, device=query.device).tril(total - new)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=new == total, enable_gqa=query.shape[1] != key.shape[1]
    )


def _attention_within(documents: Documents, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Document by document: no mask of T x T, and no arithmetic on pairs that do not see each other."""
    batch, length = query.shape[0], query.shape[2]
    assert key.shape[2] == length, f"{length} positions cannot be told apart by document with {key.shape[2]} keys"
    assert len(documents) == batch, f"documents of {len(documents)} rows for a batch of {batch}"
    rows = []
    # split and not indexing: its backward is one concatenation, and not a full-size zero tensor for each slice.
    for begins, *row in zip(documents, query.split(1), key.split(1), value.split(1), strict=True):
        edges = (*begins, length)
        sizes = [stop - start for start, stop in zip(edges, edges[1:], strict=False)]
        assert edges[0] == 0 and min(sizes) > 0, f"documents begin at {begins} in a sequence of {length} positions"
        parts = [causal_attention(*part) for part in zip(*(x.split(sizes, dim=2) for x in row), strict=True)]
        rows.append(torch.cat(parts, dim=2))
    return torch.cat(rows)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (Ainslie et al. 2023) and rotary positions."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.q_proj = Linear(config.hidden_size, config.num_attention_heads * config.head_dim)
        self.k_proj = Linear(config.hidden_size, config.num_key_value_heads * config.head_dim)
        self.v_proj = Linear(config.hidden_size, config.num_key_value_heads * config.head_dim)
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, config.hidden_size)
        self.attend: Callable[[Tensor, Tensor, Tensor, Documents | None], Tensor] = causal_attention

    def forward(self, x: Tensor, places: Places) -> Tensor:
        query = rotate(self._heads(self.q_proj(x)), *places.rotary)
        key = rotate(self._heads(self.k_proj(x)), *places.rotary)
        value = self._heads(self.v_proj(x))
        if places.cache is not None:
            key, value = places.cache.extend(self.layer, key, value, start=places.start)
        return self.o_proj(self.attend(query, key, value, places.documents).transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention, then SwiGLU, each on the normalised input and added to it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, places: Places) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), places)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """A LLaMA, or the slice of one that a pipeline stage holds.

    `layers` are the decoder layers of this slice (all by default), under their global numbers; `first` adds the
    embedding, `last` the final norm and the head. Constructing takes no time: weights are unset (norms are ones).
    """

    def __init__(
        self, config: ModelConfig, *, layers: range | None = None, first: bool = True, last: bool = True
    ) -> None:
        super().__init__()
        self.config, self.first, self.last = config, first, last
        self.tied = last and config.tie_word_embeddings
        numbers = range(config.num_hidden_layers) if layers is None else layers
        self.model = nn.Module()
        # A tied head belongs to the embedding by name, so a last stage without a first has the embedding too.
        if first or self.tied:
            self.model.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleDict({str(n): DecoderLayer(config, n) for n in numbers})
        if last:
            self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self._tie()

    def forward(
        self,
        x: Tensor,
        *,
        start: int = 0,
        length: int | None = None,
        documents: Documents | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Logits (B, T, vocab_size) on the last slice, else hidden states (B, T, hidden_size).

        x: token ids (B, T) int64 on the first slice, else hidden states (B, T, hidden_size) of the slice before.
        start: the position of x[:, 0]; positions before it are taken from `cache`, which then must have seen them.
        length: the number of positions of this batch, of which hidden states may be a part; default: those of x.
        documents: where the documents of each row begin; positions see only their own. None: one document a row.
        """
        length = x.shape[1] if length is None else length
        rotary = rotary_tables(self.config, start=start, length=length, device=x.device)
        places = Places(rotary, start, cache, documents)
        if self.first:
            x = self.model.embed_tokens(x)
        for layer in self.model.layers.values():
            x = layer(x, places)
        return self.lm_head(self.model.norm(x)) if self.last else x

    def _tie(self) -> None:
        if self.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _apply(self, fn: Any, recurse: bool = True) -> Llama:
        # to(), to_empty() and casts may make a new Parameter for each module that holds one, which unties the head.
        super()._apply(fn, recurse)
        self._tie()
        return self
