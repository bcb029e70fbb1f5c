"""Which decoder layers each pipeline stage holds."""

from __future__ import annotations

from collections.abc import Sequence

from llama_dist.config import ModelConfig
from llama_dist.layout import consecutive, split_layers


def stage_layers(
    config: ModelConfig, *, stages: int, seq_len: int, given: Sequence[int] | None = None
) -> list[range]:
    """The layers of each of `stages` stages (pp * virtual_stages) in model order, each at least one.

    As many as `given` says (parallel.stage_layers), or such that the dearest stage takes least time: a pipeline goes
    at the pace of its slowest stage.
    """
    if given is not None:
        assert len(given) == stages and sum(given) == config.num_hidden_layers, f"{given} layers in {stages} stages"
        return consecutive(given)
    return split_layers(config.num_hidden_layers, stages=stages, last_cost=head_cost(config, seq_len=seq_len))


def head_cost(config: ModelConfig, *, seq_len: int) -> float:
    """What the head takes in units of one decoder layer: the ratio of their multiplications per token.

    Attention counts by what a causal one does, half of all pairs. The embedding is looked up and not multiplied, and
    so costs nothing: its rows are memory on the first stage, not time.
    """
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    projections = config.hidden_size * (2 * queries + 2 * keys + 3 * config.intermediate_size)
    return config.vocab_size * config.hidden_size / (projections + queries * seq_len)
