"""Hugging Face checkpoints: both generations of config.json, one file or shards, and every way to be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from llama_dist.config import ModelConfig, RopeScaling
from llama_dist.errors import UserError
from llama_dist.model.cuts import logical_shapes
from llama_dist.model.hf import hf_tensors, load_hf_config, load_hf_model

SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MINIMAL = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def write_config(folder: Path, **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**MINIMAL, **changes}))
    return folder


def save_theirs(folder: Path, *, shard_size: str = "1GB", **changes: Any) -> LlamaForCausalLM:
    fields = {name: value for name, value in MINIMAL.items() if name != "architectures"}
    torch.manual_seed(1)
    theirs = LlamaForCausalLM(LlamaConfig(**fields, **changes))
    theirs.save_pretrained(folder, max_shard_size=shard_size)
    return theirs


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_minimal_config_gets_hugging_faces_defaults(tmp_path: Path) -> None:
    config, theirs = load_hf_config(write_config(tmp_path)), LlamaConfig()
    assert (config.num_key_value_heads, config.head_dim) == (4, 4)
    for name in ("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "initializer_range"):
        assert getattr(config, name) == getattr(theirs, name), name
    assert (config.rope_theta, config.rope_scaling) == (10000.0, None)


@pytest.mark.parametrize(
    "written",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **SCALING}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **SCALING}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **SCALING}},
    ],
    ids=["transformers 4", "early transformers 4", "transformers 5"],
)
def test_llama_3_scaling_in_every_spelling(tmp_path: Path, written: dict[str, Any]) -> None:
    config = load_hf_config(write_config(tmp_path, **written))
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScaling(**SCALING)


@pytest.mark.parametrize(
    "written",
    [
        {"rope_theta": 300.0, "rope_scaling": None},
        {"rope_theta": 300.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
        {"rope_parameters": None, "rope_theta": 300.0},
    ],
)
def test_plain_rope_in_every_spelling(tmp_path: Path, written: dict[str, Any]) -> None:
    config = load_hf_config(write_config(tmp_path, **written))
    assert (config.rope_theta, config.rope_scaling) == (300.0, None)


def test_given_heads_are_kept(tmp_path: Path) -> None:
    config = load_hf_config(write_config(tmp_path, head_dim=10, num_key_value_heads=2, rms_norm_eps=1e-5))
    assert (config.head_dim, config.num_key_value_heads, config.rms_norm_eps) == (10, 2, 1e-5)


def test_nulls_are_defaults(tmp_path: Path) -> None:
    config = load_hf_config(write_config(tmp_path, head_dim=None, num_key_value_heads=None))
    assert (config.head_dim, config.num_key_value_heads) == (4, 4)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
        ({"architectures": None}, "architectures is None"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "'yarn'"),
        ({"rope_scaling": 3}, "rope_scaling is 3"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"rope_scaling": {"rope_type": "llama3", **SCALING, "factor": 0.5}}, "factor"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    text = refusal(lambda: load_hf_config(write_config(tmp_path, **changes)))
    assert named in text and str(tmp_path / "config.json") in text


def test_missing_fields_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "vocab_size": 5}))
    assert "hidden_size, intermediate_size" in refusal(lambda: load_hf_config(tmp_path))


@pytest.mark.parametrize("content", ["{", "[1]", "\udcff"])
def test_broken_json_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    assert "config.json" in refusal(lambda: load_hf_config(tmp_path))


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path / 'config.json'}: no such file" in refusal(lambda: load_hf_model(tmp_path))


@pytest.mark.parametrize("shard_size", ["1GB", "3KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_models_load_exactly(tmp_path: Path, shard_size: str, tied: bool, dtype: torch.dtype) -> None:
    theirs = save_theirs(tmp_path, shard_size=shard_size, tie_word_embeddings=tied, dtype=dtype).to(dtype)
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert ((tmp_path / "model.safetensors.index.json").exists()) == (shard_size == "3KB")
    expected = dict(theirs.named_parameters())
    tensors = dict(hf_tensors(tmp_path))
    assert list(tensors) == list(logical_shapes(load_hf_config(tmp_path)))
    assert tensors.keys() == expected.keys()
    for name, parameter in load_hf_model(tmp_path).named_parameters():
        assert parameter.dtype == torch.float32 and tensors[name].dtype == dtype
        assert torch.equal(parameter, expected[name].float()), name


def test_the_real_checkpoint_loads(shared_data) -> None:
    config = load_hf_config(shared_data / "checkpoints" / "stories260K" / "hf")
    assert config == ModelConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )


def test_missing_unexpected_and_misshaped_tensors_are_named(tmp_path: Path) -> None:
    save_theirs(tmp_path)
    edit_weights(tmp_path, lambda t: t.update({"model.norm.weight": torch.ones(17)}))
    text = refusal(lambda: load_hf_model(tmp_path))
    assert "model.norm.weight (17,) instead of (16,)" in text
    edit_weights(tmp_path, lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(24, 16)}))
    assert "model.layers.2.mlp.up_proj.weight" in refusal(lambda: load_hf_model(tmp_path))
    edit_weights(tmp_path, lambda t: t.pop("model.layers.1.self_attn.q_proj.weight"))
    assert "missing: model.layers.1.self_attn.q_proj.weight" in refusal(lambda: load_hf_model(tmp_path))


def test_whole_numbers_are_not_weights(tmp_path: Path) -> None:
    save_theirs(tmp_path)
    edit_weights(tmp_path, lambda t: t.update({"model.norm.weight": torch.ones(16, dtype=torch.int8)}))
    assert "model.norm.weight I8" in refusal(lambda: load_hf_model(tmp_path))


def test_old_rotary_buffers_are_passed_over(tmp_path: Path) -> None:
    save_theirs(tmp_path)
    plain = load_hf_model(tmp_path).state_dict()
    edit_weights(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))
    loaded = load_hf_model(tmp_path).state_dict()
    assert loaded.keys() == plain.keys() and all(torch.equal(loaded[name], plain[name]) for name in plain)


def test_a_stored_tied_head_must_be_the_embedding(tmp_path: Path) -> None:
    theirs = save_theirs(tmp_path, tie_word_embeddings=True)
    embedding = theirs.model.embed_tokens.weight.detach()
    edit_weights(tmp_path, lambda t: t.update({"lm_head.weight": embedding.clone()}))
    load_hf_model(tmp_path)
    edit_weights(tmp_path, lambda t: t.update({"lm_head.weight": embedding + 1}))
    assert "lm_head.weight differs" in refusal(lambda: load_hf_model(tmp_path))


def test_missing_shards_and_weights_are_named(tmp_path: Path) -> None:
    save_theirs(tmp_path, shard_size="3KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refusal(lambda: load_hf_model(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert "weight_map" in refusal(lambda: load_hf_model(tmp_path))
    (tmp_path / "model.safetensors.index.json").unlink()
    assert "no weights" in refusal(lambda: load_hf_model(tmp_path))


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: data[:4], lambda data: b"\xff" * len(data)])
def test_a_damaged_file_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    save_theirs(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert str(path) in refusal(lambda: load_hf_model(tmp_path))


@pytest.mark.parametrize("files", [1, 2])
def test_files_of_torch_save_are_read_as_tensors(tmp_path: Path, files: int) -> None:
    theirs = save_theirs(tmp_path)
    tensors = {name: tensor.clone() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    (tmp_path / "model.safetensors").unlink()
    names = [f"pytorch_model-{i + 1}.bin" for i in range(files)] if files > 1 else ["pytorch_model.bin"]
    homes = {tensor: names[i % files] for i, tensor in enumerate(tensors)}
    for name in names:
        torch.save({tensor: tensors[tensor] for tensor, home in homes.items() if home == name}, tmp_path / name)
    if files > 1:
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": homes}))
    ours = dict(load_hf_model(tmp_path).named_parameters())
    expected = dict(theirs.named_parameters())
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)


def test_a_pickle_that_holds_more_than_tensors_is_refused_and_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    write_config(tmp_path)
    torch.save(Trap(), tmp_path / "pytorch_model.bin")
    assert "cannot be read as tensors alone" in refusal(lambda: load_hf_model(tmp_path))
    assert not (tmp_path / "sprung").exists()
