"""The one table of weights: what tensor parallelism cuts, what shapes they have, how many there are."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from llama_dist.boxes import Box, Cut, slice_box
from llama_dist.config import ModelConfig

# By the end of the module's name. Linear weights are (out, in): cutting outputs is DIM0, cutting inputs DIM1.
CUTS: dict[str, Cut] = {
    "model.embed_tokens": Cut.DIM0,
    "input_layernorm": Cut.NONE,
    "self_attn.q_proj": Cut.DIM0,
    "self_attn.k_proj": Cut.DIM0,
    "self_attn.v_proj": Cut.DIM0,
    "self_attn.o_proj": Cut.DIM1,
    "post_attention_layernorm": Cut.NONE,
    "mlp.gate_proj": Cut.DIM0,
    "mlp.up_proj": Cut.DIM0,
    "mlp.down_proj": Cut.DIM1,
    "model.norm": Cut.NONE,
    "lm_head": Cut.DIM0,
}


def cut_of(name: str) -> Cut:
    """How the parameter of this logical name is cut; KeyError names one that has no row in CUTS."""
    module = name.removesuffix(".weight")
    for suffix, cut in CUTS.items():
        if module == suffix or module.endswith("." + suffix):
            return cut
    raise KeyError(f"{name}: no row of CUTS says how tensor parallelism cuts this weight; add one in model/cuts.py")


# What AdamW keeps of each weight, in its shape.
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Slice:
    """What a tensor-parallel rank holds of a logical tensor.

    `copies` ranks hold this very `box` of the tensor of `shape`; the rank is the `owner` where it is the first of them.
    """

    box: Box
    shape: tuple[int, ...]
    owner: bool
    copies: int


def slice_of(name: str, config: ModelConfig, *, tp: int, tp_rank: int) -> Slice:
    """The slice of the logical tensor `name` on rank `tp_rank` of `tp`.

    A key/value head is not cut: where there are more ranks than heads, neighbours hold the same one.
    """
    cut, shape = cut_of(name), _logical_shape(name, config)
    parts = 1 if cut is Cut.NONE else tp
    if name.endswith(("k_proj.weight", "v_proj.weight")):
        parts = min(tp, config.num_key_value_heads)
    assert tp % parts == 0, f"{name}: {parts} parts do not spread evenly over {tp} ranks"
    copies = tp // parts
    box = slice_box(shape, cut=cut, parts=parts, part=tp_rank // copies)
    return Slice(box, shape, owner=tp_rank % copies == 0, copies=copies)


def logical_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter's name and unsharded shape, in the order of the model; a tied head is absent."""
    hidden, vocab = config.hidden_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for number in range(config.num_hidden_layers):
        for suffix, shape in _layer_shapes(config).items():
            shapes[f"model.layers.{number}.{suffix}.weight"] = shape
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _logical_shape(name: str, config: ModelConfig) -> tuple[int, ...]:
    if name.startswith("model.layers."):
        return _layer_shapes(config)[".".join(name.split(".")[3:-1])]
    return (config.hidden_size,) if cut_of(name) is Cut.NONE else (config.vocab_size, config.hidden_size)


def _layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, wide = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    return {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }


def num_parameters(config: ModelConfig) -> int:
    """Parameters of the whole model, a tied head counted once."""
    return sum(prod(shape) for shape in logical_shapes(config).values())


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Floating point operations of forward and backward per trained token, without recomputation.

    PaLM appendix B: 6 N + 12 L H Q T, attention counted in full although it is causal. N leaves out the embedding,
    which is looked up and not multiplied, but has the head, tied or not.
    """
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * seq_len
    return 6.0 * (num_parameters(config) - embedding) + 12.0 * attention
