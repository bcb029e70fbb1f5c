"""Initial weights as a function of (seed, logical name, element): the same on every layout, whoever draws what."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from llama_dist.boxes import Box
from llama_dist.config import ModelConfig

_BLOCK = 4  # 64-bit words per step of Philox's counter
_CHUNK = 1 << 15  # elements drawn at a time: the float64 temporaries stay in cache
_COPY = 1 << 22  # elements held on the host at a time by init_


def draw(
    name: str, shape: tuple[int, ...], *, seed: int, start: int, stop: int, config: ModelConfig
) -> torch.Tensor:
    """Elements [start, stop) of the flat logical tensor `name` of `shape`: (stop - start,) float32 on the CPU.

    Norm weights (the one-dimensional ones) are ones. Matrices are normal with standard deviation
    `initializer_range`, and those that write into the residual stream with that over sqrt(2 * num_hidden_layers)
    (GPT-2, section 2.3). `seed` is any non-negative integer.
    """
    assert 0 <= start <= stop <= math.prod(shape), f"{name}: [{start}, {stop}) is not a range of a tensor of {shape}"
    if len(shape) == 1:
        return torch.ones(stop - start)
    out = np.empty(stop - start, dtype=np.float32)
    key = _key(seed, name)
    std = standard_deviation(name, config)
    for first, last in _ranges(start, stop, _CHUNK):
        np.multiply(_normal(key, first, last), std, out=out[first - start : last - start], casting="same_kind")
    return torch.from_numpy(out)


def draw_box(
    name: str, shape: tuple[int, ...], box: Box, *, seed: int, config: ModelConfig
) -> torch.Tensor:
    """The elements of one box of the logical tensor, of shape `box.shape`; see `draw`."""
    out = torch.empty(box.shape)
    whole_rows = box.shape[1:] == shape[1:]
    row, width = math.prod(shape[1:]), math.prod(box.shape[1:])
    rows_at_once = box.shape[0] if whole_rows else 1
    flat = out.view(-1)
    for i in range(0, box.shape[0], rows_at_once):
        start = (box.offset[0] + i) * row + (0 if whole_rows else box.offset[1])
        count = rows_at_once * width
        drawn = draw(name, shape, seed=seed, start=start, stop=start + count, config=config)
        flat[i * width : i * width + count] = drawn
    return out


def standard_deviation(name: str, config: ModelConfig) -> float:
    """The spread that a matrix is drawn with."""
    if name.endswith(("self_attn.o_proj.weight", "mlp.down_proj.weight")):
        return config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
    return config.initializer_range


@torch.no_grad()
def init_(module: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter of a plain module (one that holds whole logical tensors) in place, on any device."""
    for name, parameter in module.named_parameters():
        assert parameter.is_contiguous(), f"{name} is not contiguous"
        flat, shape = parameter.view(-1), tuple(parameter.shape)
        for start, stop in _ranges(0, flat.numel(), _COPY):
            flat[start:stop].copy_(draw(name, shape, seed=seed, start=start, stop=stop, config=config))


def _normal(key: int, start: int, stop: int) -> np.ndarray:
    """Standard normal elements [start, stop) of the stream of `key`, float64.

    Elements 2i and 2i + 1 are the Box-Muller pair of words 2i and 2i + 1. In float64, so that an ulp by which one
    machine's logarithm differs from another's is lost when the result is rounded to float32.
    """
    block = start // _BLOCK
    num_blocks = -(-stop // _BLOCK) - block
    words = np.random.Philox(key=key, counter=block).random_raw(num_blocks * _BLOCK)
    uniform = (words >> np.uint64(11)).astype(np.float64).reshape(-1, 2)
    uniform *= 2.0**-53
    radius = np.sqrt(-2.0 * np.log1p(-uniform[:, 0]))  # 1 - u is never 0
    angle = uniform[:, 1] * (2 * math.pi)
    pairs = np.empty_like(uniform)
    np.multiply(radius, np.cos(angle), out=pairs[:, 0])
    np.multiply(radius, np.sin(angle), out=pairs[:, 1])
    return pairs.reshape(-1)[start - block * _BLOCK : stop - block * _BLOCK]


def _key(seed: int, name: str) -> int:
    assert seed >= 0, f"seed {seed} is negative"
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little")


def _ranges(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, size):
        yield first, min(first + size, stop)
