"""Initial weights: exact under any split, and as random as they claim."""

from __future__ import annotations

import random
from math import prod, sqrt

import pytest
import torch

from llama_dist.config import ModelConfig
from llama_dist.model.init import draw, init_
from llama_dist.model.llama import Llama

CONFIG = ModelConfig(
    vocab_size=2000,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=8,
    num_attention_heads=4,
    max_position_embeddings=64,
)
NAME, SHAPE = "model.layers.3.mlp.up_proj.weight", (1024, 1000)
COUNT = prod(SHAPE)
FIRST = [0.01120813935995102, 0.03074664995074272, -0.025694208219647408, 0.007207636255770922]


def drawn(name: str = NAME, start: int = 0, stop: int = COUNT, *, seed: int = 0) -> torch.Tensor:
    return draw(name, SHAPE, seed=seed, start=start, stop=stop, config=CONFIG)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack((a.double(), b.double())))[0, 1].item()


def test_every_split_gives_the_same_bits() -> None:
    whole, chance = drawn(), random.Random(5)
    # Around the edges of counter blocks (4), of the inner chunks (2**15), and at random.
    points = {*range(10), *range(2**15 - 5, 2**15 + 6), 3 * 2**15, COUNT - 1, COUNT}
    points |= {chance.randrange(COUNT) for _ in range(60)}
    for start in points:
        for length in (0, 1, 2, 3, 7, 1000, 2**15 + 1):
            stop = min(start + length, COUNT)
            assert torch.equal(drawn(start=start, stop=stop), whole[start:stop]), (start, stop)
    edges = sorted(points | {0})
    parts = [drawn(start=a, stop=b) for a, b in zip(edges, edges[1:], strict=False)]
    assert torch.equal(torch.cat(parts), whole)


def test_the_numbers_of_a_seed_never_change() -> None:
    # Drawn by this code in its first version: a resumed or repeated run must begin with the same weights.
    assert drawn(stop=4).tolist() == pytest.approx(FIRST, rel=1e-6)


def test_moments_are_those_of_a_normal() -> None:
    z = drawn().double() / CONFIG.initializer_range
    # Five standard errors of each moment of a million normal numbers.
    assert abs(z.mean()) < 5 / sqrt(COUNT)
    assert abs(z.pow(2).mean() - 1) < 5 * sqrt(2 / COUNT)
    assert abs(z.pow(3).mean()) < 5 * sqrt(15 / COUNT)
    assert abs(z.pow(4).mean() - 3) < 5 * sqrt(96 / COUNT)
    assert 4.3 < z.abs().max() < 6.5


def test_the_distribution_is_normal() -> None:
    z = drawn().double().sort().values / CONFIG.initializer_range
    expected = torch.special.ndtr(z)
    found = torch.arange(1, COUNT + 1, dtype=torch.float64) / COUNT
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is exceeded by chance once in a thousand.
    assert (found - expected).abs().max() < 1.95 / sqrt(COUNT)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 8, 1000, 2**15])
def test_neighbouring_elements_do_not_correlate(lag: int) -> None:
    z = drawn()
    # Nor do their squares: the two of a Box-Muller pair share a radius.
    for values in (z, z.square(), z.sign()):
        assert abs(correlation(values[:-lag], values[lag:])) < 5 / sqrt(COUNT - lag)


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        ("model.layers.4.mlp.up_proj.weight", 0),
        ("model.layers.3.mlp.gate_proj.weight", 0),
        (NAME, 1),
        (NAME, 2**100),
    ],
    ids=["next layer", "next matrix", "next seed", "huge seed"],
)
def test_other_tensors_and_seeds_are_unrelated(name: str, seed: int) -> None:
    other = drawn(name, seed=seed)
    ours = drawn()
    assert abs(correlation(ours, other)) < 5 / sqrt(COUNT)
    assert abs(correlation(ours[:-1], other[1:])) < 5 / sqrt(COUNT)
    assert abs(correlation(ours.square(), other.square())) < 5 / sqrt(COUNT)


def test_a_name_does_not_read_as_another_seed() -> None:
    assert not torch.equal(drawn("1:a", seed=1, stop=8), drawn("a", seed=11, stop=8))


def test_negative_seeds_and_ranges_outside_are_refused() -> None:
    with pytest.raises(AssertionError, match="seed -1"):
        drawn(seed=-1)
    with pytest.raises(AssertionError, match="is not a range"):
        drawn(stop=COUNT + 1)


def test_a_model_is_filled_by_kind_of_weight() -> None:
    model = Llama(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    init_(model, CONFIG, seed=11)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        expected = 0.02 / sqrt(2 * 8) if residual else 0.02
        assert abs(parameter.std() / expected - 1) < 5 / sqrt(2 * parameter.numel()), name
        flat = draw(name, tuple(parameter.shape), seed=11, start=0, stop=parameter.numel(), config=CONFIG)
        assert torch.equal(parameter.flatten(), flat), name


def test_a_model_in_bf16_gets_the_rounded_weights() -> None:
    wide, narrow = Llama(CONFIG), Llama(CONFIG).bfloat16()
    init_(wide, CONFIG, seed=2)
    init_(narrow, CONFIG, seed=2)
    for (name, ours), theirs in zip(wide.named_parameters(), narrow.parameters(), strict=True):
        assert torch.equal(ours.bfloat16(), theirs), name
