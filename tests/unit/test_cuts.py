"""The table of weights: complete, right in shape, and adding up to the published counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llama_dist.boxes import Cut
from llama_dist.config import ModelConfig
from llama_dist.model.cuts import CUTS, cut_of, flops_per_token, logical_shapes, num_parameters, slice_of
from llama_dist.model.llama import Llama


def sized(vocab: int, hidden: int, wide: int, layers: int, heads: int, kv_heads: int, **more: object) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        **more,
    )


PUBLISHED = {
    "llama2-7b": (sized(32000, 4096, 11008, 32, 32, 32), 6_738_415_616),
    "llama2-13b": (sized(32000, 5120, 13824, 40, 40, 40), 13_015_864_320),
    "llama2-70b": (sized(32000, 8192, 28672, 80, 64, 8), 68_976_648_192),
    "llama3-8b": (sized(128256, 4096, 14336, 32, 32, 8), 8_030_261_248),
    "llama3-70b": (sized(128256, 8192, 28672, 80, 64, 8), 70_553_706_496),
    "llama3.1-405b": (sized(128256, 16384, 53248, 126, 128, 8), 405_853_388_800),
    "llama3.2-1b": (sized(128256, 2048, 8192, 16, 32, 8, tie_word_embeddings=True), 1_235_814_400),
    "tinyllama-1.1b": (sized(32000, 2048, 5632, 22, 32, 4), 1_100_048_384),
    "smollm2-135m": (sized(49152, 576, 1536, 30, 9, 3, tie_word_embeddings=True), 134_515_008),
}


@pytest.mark.parametrize(("config", "count"), PUBLISHED.values(), ids=PUBLISHED)
def test_counts_are_the_published_ones(config: ModelConfig, count: int) -> None:
    assert num_parameters(config) == count


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head_dim", [None, 20])
def test_names_and_shapes_are_the_models(tied: bool, head_dim: int | None) -> None:
    config = sized(100, 64, 96, 2, 4, 2, tie_word_embeddings=tied, **({"head_dim": head_dim} if head_dim else {}))
    with torch.device("meta"):
        model = Llama(config)
    assert [(name, tuple(p.shape)) for name, p in model.named_parameters()] == list(logical_shapes(config).items())


def test_every_weight_has_a_row_and_every_row_a_weight() -> None:
    config = sized(100, 64, 96, 12, 4, 2)
    used = {suffix for suffix in CUTS for name in logical_shapes(config) if f"{suffix}.weight" in name}
    assert used == set(CUTS)
    for name, shape in logical_shapes(config).items():
        cut = cut_of(name)
        assert (cut is Cut.NONE) == (len(shape) == 1), name


def test_cuts_of_attention_and_mlp_meet() -> None:
    # Column then row: what the first linear's outputs are cut into, the last one's inputs must be.
    for number in (0, 11):
        layer = f"model.layers.{number}."
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            assert cut_of(f"{layer}{name}.weight") is Cut.DIM0
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            assert cut_of(f"{layer}{name}.weight") is Cut.DIM1


def test_a_weight_without_a_row_is_named() -> None:
    with pytest.raises(KeyError, match=r"model.layers.0.self_attn.q_norm.weight"):
        cut_of("model.layers.0.self_attn.q_norm.weight")


def test_flops_of_llama2_7b_by_hand() -> None:
    config, count = PUBLISHED["llama2-7b"]
    matrices = count - 32000 * 4096
    assert flops_per_token(config, 4096) == 6 * matrices + 12 * 32 * 32 * 128 * 4096


def test_a_tied_head_costs_as_much_as_an_untied_one() -> None:
    untied = sized(100, 64, 96, 2, 4, 2)
    tied = untied.model_copy(update={"tie_word_embeddings": True})
    assert flops_per_token(tied, 32) == flops_per_token(untied, 32)
    assert flops_per_token(tied, 64) - flops_per_token(tied, 32) == 12 * 2 * 64 * 32


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("kv_heads", [8, 4, 2, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_owners_cover_every_tensor_exactly_once(tp: int, kv_heads: int, tied: bool) -> None:
    config = sized(16, 16, 24, 2, 8, kv_heads, tie_word_embeddings=tied)
    for name, shape in logical_shapes(config).items():
        slices = [slice_of(name, config, tp=tp, tp_rank=rank) for rank in range(tp)]
        covered = np.zeros(shape, dtype=int)
        boxes = [each.box for each in slices]
        for rank, each in enumerate(slices):
            assert each.shape == shape
            assert boxes.count(each.box) == each.copies, name
            assert each.owner == (boxes.index(each.box) == rank), name
            if each.owner:
                covered[each.box.slices] += 1
        assert (covered == 1).all(), name


def test_neighbours_share_a_key_head_and_have_its_query_heads() -> None:
    config = sized(16, 16, 24, 1, 8, 2)  # query heads of 2 rows each: 0 to 3 see key head 0, 4 to 7 see key head 1
    layer = "model.layers.0.self_attn."
    for rank, (first, key, owner) in enumerate([(0, 0, True), (2, 0, False), (4, 1, True), (6, 1, False)]):
        query = slice_of(f"{layer}q_proj.weight", config, tp=4, tp_rank=rank)
        assert query.box.slices == (slice(2 * first, 2 * first + 4), slice(0, 16)) and query.owner
        for name in ("k_proj", "v_proj"):
            held = slice_of(f"{layer}{name}.weight", config, tp=4, tp_rank=rank)
            assert held.box.slices == (slice(2 * key, 2 * key + 2), slice(0, 16))
            assert (held.owner, held.copies, held.shape) == (owner, 2, (4, 16))


def test_what_does_not_split_is_named() -> None:
    with pytest.raises(AssertionError, match="v_proj.weight: 2 parts do not spread evenly over 3 ranks"):
        slice_of("model.layers.0.self_attn.v_proj.weight", sized(9, 12, 24, 1, 6, 2), tp=3, tp_rank=0)
    with pytest.raises(KeyError, match="q_norm"):
        slice_of("model.layers.0.self_attn.q_norm.weight", sized(9, 12, 24, 1, 6, 2), tp=3, tp_rank=0)
