"""Meta's own files: their shards merged, their rotation undone, nothing of them run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exchange_helpers import logits, save_theirs, typed
from transformers import LlamaForCausalLM

from llama_dist.checkpoint.whole import find_checkpoint, load_model
from llama_dist.config import ModelConfig
from llama_dist.exchange.meta import MetaWeights, _meta_rows
from llama_dist.model.llama import rotary_tables, rotate

PARAMS = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "vocab_size": -1}
COLUMNS, ROWS, WHOLE = 1, 0, None
CUT = {
    "attention.wq": ROWS, "attention.wk": ROWS, "attention.wv": ROWS, "attention.wo": COLUMNS, "feed_forward.w1": ROWS,
    "feed_forward.w2": COLUMNS, "feed_forward.w3": ROWS, "output": ROWS, "norm": WHOLE,
}  # fmt: skip


def to_meta(theirs: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """The weights under Meta's names, queries and keys in Meta's order: the inverse of Hugging Face's own script."""

    def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
        return weight.view(heads, 2, weight.shape[0] // heads // 2, -1).transpose(1, 2).reshape(weight.shape)

    state = {name: p.detach() for name, p in theirs.named_parameters()}
    out = {
        "tok_embeddings.weight": state["model.embed_tokens.weight"],
        "norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
        "rope.freqs": torch.ones(4),
    }
    for number in range(2):
        source, target = f"model.layers.{number}.", f"layers.{number}."
        out[target + "attention.wq.weight"] = interleaved(state[source + "self_attn.q_proj.weight"], 4)
        out[target + "attention.wk.weight"] = interleaved(state[source + "self_attn.k_proj.weight"], 2)
        for ours, meta in (
            ("self_attn.v_proj", "attention.wv"), ("self_attn.o_proj", "attention.wo"), ("mlp.gate_proj", "feed_forward.w1"),
            ("mlp.down_proj", "feed_forward.w2"), ("mlp.up_proj", "feed_forward.w3"),
            ("input_layernorm", "attention_norm"), ("post_attention_layernorm", "ffn_norm"),
        ):  # fmt: skip
            out[f"{target}{meta}.weight"] = state[f"{source}{ours}.weight"]
    return out


def write_meta(folder: Path, tensors: dict[str, torch.Tensor], *, shards: int, embedding: int, **params: Any) -> None:
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(PARAMS | params))
    for rank in range(shards):
        own = {}
        for name, tensor in tensors.items():
            dim = embedding if name.startswith("tok") else next((d for k, d in CUT.items() if f"{k}.weight" in name), None)
            dim = None if "norm" in name or name == "rope.freqs" else dim
            parts, mine = shards, rank
            if name.endswith(("wk.weight", "wv.weight")) and shards > 2:  # two heads on four ranks
                parts, mine = 2, rank // (shards // 2)
            own[name] = (tensor if dim is None else tensor.chunk(parts, dim)[mine]).clone()
        torch.save(own, folder / f"consolidated.{rank:02d}.pth")


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("embedding", [COLUMNS, ROWS], ids=["llama 2", "llama 3"])
def test_metas_shards_give_the_same_logits(tmp_path: Path, capsys: Any, shards: int, embedding: int) -> None:
    theirs = save_theirs(tmp_path / "hf", vocab_size=92, num_key_value_heads=2)
    write_meta(tmp_path / "meta", to_meta(theirs), shards=shards, embedding=embedding)
    typed(capsys, "import", tmp_path / "meta", "--to", tmp_path / "ours")
    ours = load_model(find_checkpoint(tmp_path / "ours")[0])
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    assert "equal: all" in typed(capsys, "diff", tmp_path / "meta", tmp_path / "hf")


def test_queries_and_keys_are_put_in_our_order() -> None:
    """Scores by Meta's rotation, of neighbours as complex numbers, are those of ours of the rows in our order."""
    torch.manual_seed(1)
    query, key = torch.randn(2, 5, 8)
    model = ModelConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=8
    )
    angles = torch.outer(torch.arange(5.0), 1.0 / 10000.0 ** (torch.arange(0, 8, 2) / 8))
    turns = torch.polar(torch.ones_like(angles), angles)
    metas = [torch.view_as_real(torch.view_as_complex(x.view(5, 4, 2)) * turns).flatten(1) for x in (query, key)]
    order = _meta_rows(torch.arange(8), 8)
    cos, sin = rotary_tables(model, start=0, length=5, device=torch.device("cpu"))
    ours = [rotate(x[:, order], cos, sin) for x in (query, key)]
    torch.testing.assert_close(ours[0] @ ours[1].T, metas[0] @ metas[1].T)


def test_what_params_say_becomes_the_model(tmp_path: Path) -> None:
    theirs = save_theirs(tmp_path / "hf", num_key_value_heads=2)
    tensors = to_meta(theirs)
    write_meta(tmp_path / "plain", tensors, shards=1, embedding=ROWS)
    plain = MetaWeights(tmp_path / "plain").model
    assert (plain.vocab_size, plain.intermediate_size, plain.max_position_embeddings) == (90, 40, 4096)
    assert (plain.rope_theta, plain.rope_scaling, plain.tie_word_embeddings) == (10000.0, None, False)
    write_meta(tmp_path / "scaled", tensors, shards=1, embedding=ROWS, use_scaled_rope=True, rope_theta=5e5)
    scaled = MetaWeights(tmp_path / "scaled").model
    assert scaled.rope_scaling.factor == 8.0 and scaled.max_position_embeddings == 131_072 and scaled.rope_theta == 5e5
    tensors["output.weight"] = tensors["tok_embeddings.weight"]
    write_meta(tmp_path / "tied", tensors, shards=1, embedding=ROWS)
    tied = MetaWeights(tmp_path / "tied")
    assert tied.model.tie_word_embeddings and "lm_head.weight" not in tied.tensors()


def test_what_is_wrong_with_metas_files_is_said(tmp_path: Path, capsys: Any) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    tensors = to_meta(save_theirs(tmp_path / "hf", num_key_value_heads=2))
    write_meta(tmp_path / "meta", tensors, shards=2, embedding=ROWS)
    first, second = sorted((tmp_path / "meta").glob("*.pth"))

    def refused() -> str:
        return typed(capsys, "import", tmp_path / "meta", "--to", tmp_path / "ours", status=2)

    kept = second.read_bytes()
    second.unlink()
    assert "no part of" in refused() or "all of the consolidated" in refused()
    second.write_bytes(kept[:5000])
    assert str(second) in refused()
    torch.save({"norm.weight": Trap()}, second)
    assert "tensors alone" in refused()
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "ours").exists()
    second.write_bytes(kept)
    (tmp_path / "meta/params.json").write_text(json.dumps(PARAMS | {"moe_args": {"num_experts": 8}}))
    assert "experts" in refused()
    (tmp_path / "meta/params.json").write_text("{}")
    assert "dim, n_layers, n_heads missing" in refused()
