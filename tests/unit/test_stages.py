"""Stages hold the layers that the config gives, or those that keep the slowest stage fastest."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_dist.config import ModelConfig, load_model_config
from llama_dist.model.cuts import flops_per_token
from llama_dist.model.stages import head_cost, stage_layers

MODELS = Path(__file__).resolve().parents[2] / "configs" / "model"


def model(name: str) -> ModelConfig:
    return load_model_config(MODELS / f"{name}.yaml")


@pytest.mark.parametrize("name", ["llama2-7b", "llama3-8b", "llama-tiny"])
def test_the_cost_of_the_head_is_that_of_the_flops_that_it_adds(name: str) -> None:
    """Held to the other count of flops: there attention is counted in full, which is that of half the length."""
    config = model(name)

    def flops(**change: int) -> float:
        return flops_per_token(config.model_copy(update={"tie_word_embeddings": False, **change}), 512)

    layer = flops(num_hidden_layers=2) - flops(num_hidden_layers=1)
    head = flops(vocab_size=2 * config.vocab_size) - flops()
    norms = 6.0 * 2 * config.hidden_size  # that count has their weights, which are not matrices
    assert head_cost(config, seq_len=1024) == pytest.approx(head / (layer - norms), rel=1e-6)


def test_the_last_stage_has_fewer_layers_for_its_head() -> None:
    counts = [len(part) for part in stage_layers(model("llama3-8b"), stages=4, seq_len=8192)]
    assert head_cost(model("llama3-8b"), seq_len=8192) == pytest.approx(2.08, abs=0.01)
    assert counts == [9, 9, 8, 6]
    # The longer the sequence, the dearer a layer beside the head.
    assert head_cost(model("llama3-8b"), seq_len=131072) < 0.8


@pytest.mark.parametrize("stages", [1, 2, 3, 7, 32])
def test_all_layers_are_held_once_and_no_stage_is_empty(stages: int) -> None:
    parts = stage_layers(model("llama3-8b"), stages=stages, seq_len=8192)
    assert [layer for part in parts for layer in part] == list(range(32))
    assert len(parts) == stages and min(map(len, parts)) >= 1


def test_what_the_config_gives_is_taken() -> None:
    assert stage_layers(model("llama-tiny"), stages=2, seq_len=8, given=[1, 1]) == [range(1), range(1, 2)]
    with pytest.raises(AssertionError, match="layers in 3 stages"):
        stage_layers(model("llama-tiny"), stages=3, seq_len=8, given=[1, 1])
