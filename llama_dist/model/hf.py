"""Hugging Face checkpoints: config.json and weights, checked by name and shape before anything is read.

The logical names are Hugging Face's own, so nothing is renamed. Of .bin files, which are pickles, torch reads tensors
and refuses all else; so DeepSpeed's zero_to_fp32 writes them, too.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama_dist.config import ModelConfig, RopeScaling
from llama_dist.errors import UserError
from llama_dist.model.cuts import logical_shapes
from llama_dist.model.llama import Llama

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_KINDS = ((_SINGLE, _INDEX), ("pytorch_model.bin", "pytorch_model.bin.index.json"))
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_FLOATS = ("F64", "F32", "F16", "BF16")
_NAMED = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_NAMES_SHOWN = 5
_COMPARED = 1 << 24  # elements at a time

# Fields that config.json must have, and those that LlamaConfig fills in where they are absent.
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}
_ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies, and what its file says of it; `data`: mapped into memory, of a .bin file."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    data: Tensor | None = None


def load_hf_config(folder: str | Path) -> ModelConfig:
    """The model that `folder`/config.json describes, as transformers 4 or 5 writes it.

    UserError where the file is absent or broken, or says what this model cannot be: another architecture, biases,
    another activation, quantised weights, or rotary scaling other than LLaMA-3's.
    """
    path = Path(folder) / "config.json"
    raw = _read_json(path)
    _refuse_foreign(raw, path)
    missing = [name for name in _REQUIRED if name not in raw]
    if missing:
        raise UserError(f"{path}: {_listed(missing)} missing; a LlamaForCausalLM config has all of {_REQUIRED}")
    fields = {name: raw[name] for name in _REQUIRED}
    fields |= {name: value for name, default in _DEFAULTS.items() if (value := raw.get(name, default)) is not None}
    try:
        return ModelConfig(**fields, **_rope_fields(raw, path))
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UserError(f"{path}: {wrong}") from error


class HuggingFaceWeights:
    """The weights in a folder, read by rows, never more than what is asked for.

    Names, shapes and dtypes of all files are checked when it is made; raises UserError naming what is wrong.
    """

    def __init__(self, folder: str | Path) -> None:
        self.where = str(folder)
        self.model = load_hf_config(folder)
        self._stored = _list_tensors(Path(folder))
        _check_tensors(self._stored, self.model, Path(folder))

    @property
    def dtype(self) -> str:
        """What the weights are stored in, as safetensors calls it: "BF16"."""
        return ", ".join(sorted({self._stored[name].dtype for name in self.tensors()}))

    @property
    def files(self) -> list[Path]:
        """The files that the weights lie in."""
        return sorted({stored.path for stored in self._stored.values()})

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor, in model order."""
        return logical_shapes(self.model)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, float32."""
        return _read_rows(self._stored[name], name, start, stop).float()


def hf_tensors(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Every logical tensor of the checkpoint in `folder`, in model order, in the dtype that it is stored in.

    Names, shapes and dtypes of all files are checked before the first is yielded; UserError names what is wrong.
    """
    config = load_hf_config(folder)
    stored = _list_tensors(Path(folder))
    _check_tensors(stored, config, Path(folder))
    for name, shape in logical_shapes(config).items():
        yield name, _read_rows(stored[name], name, 0, shape[0])


def load_hf_model(folder: str | Path) -> Llama:
    """The checkpoint in `folder` as a whole model in float32 on the CPU."""
    model = Llama(load_hf_config(folder)).float()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in hf_tensors(folder):
            parameters[name].copy_(tensor)
    return model


def hf_config(model: ModelConfig, *, dtype: str, bos_id: int | None, eos_id: int | None) -> dict[str, Any]:
    """The config.json of a model; `dtype` as torch names it ("bfloat16"). Transformers 4 and 5 both read it.

    The rotary base and scaling are therefore there twice: 5 has them under rope_parameters, 4 and most other programs
    beside each other.
    """
    fields = model.model_dump(mode="json", exclude={"rope_scaling"})
    scaling = model.rope_scaling and {"rope_type": "llama3", **model.rope_scaling.model_dump(mode="json")}
    rope = {"rope_theta": model.rope_theta, **(scaling or {"rope_type": "default"})}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **fields,
        "rope_scaling": scaling,
        "rope_parameters": rope,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def _refuse_foreign(raw: Mapping[str, Any], path: Path) -> None:
    if "LlamaForCausalLM" not in (raw.get("architectures") or []):
        raise UserError(
            f"{path}: architectures is {raw.get('architectures')}; only LlamaForCausalLM can be loaded; "
            "convert the checkpoint to it first"
        )
    only = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "quantization_config": None}
    for name, allowed in only.items():
        if raw.get(name, allowed) != allowed:
            raise UserError(f"{path}: {name} is {raw[name]!r}; a LLaMA here has {name} {allowed!r} only")


def _rope_fields(raw: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """transformers 5 writes everything under rope_parameters, 4 the base beside rope_scaling."""
    key = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    rope = raw.get(key) or {}
    if not isinstance(rope, Mapping):
        raise UserError(f"{path}: {key} is {rope!r}; it must be a mapping or null")
    fields: dict[str, Any] = {"rope_theta": rope.get("rope_theta", raw.get("rope_theta", 10000.0))}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"{path}: {key}.rope_type is {kind!r}; only 'default' and 'llama3' can be represented")
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError(f"{path}: partial_rotary_factor is not 1; here all of a head's dimensions are rotated")
    if kind == "llama3":
        missing = [name for name in _ROPE_SCALING if name not in rope]
        if missing:
            raise UserError(f"{path}: {key} lacks {_listed(missing)}; the llama3 kind has all of {_ROPE_SCALING}")
        fields["rope_scaling"] = RopeScaling(**{name: rope[name] for name in _ROPE_SCALING})
    return fields


def _list_tensors(folder: Path) -> dict[str, _Stored]:
    return {name: stored for path in _weight_files(folder) for name, stored in _list_file(path).items()}


def _weight_files(folder: Path) -> list[Path]:
    for single, listed in _KINDS:
        if (folder / single).is_file():
            return [folder / single]
        index = folder / listed
        if not index.is_file():
            continue
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, Mapping):
            raise UserError(f"{index}: weight_map is missing; it must map every tensor to its file")
        paths = [folder / str(name) for name in sorted(set(weight_map.values()))]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise UserError(f"{index}: it names files that are not in {folder}: {_listed(missing)}")
        return paths
    raise UserError(f"{folder}: no weights; {_SINGLE} or {_INDEX} with its shards must be there, or their like in .bin")


def _list_file(path: Path) -> dict[str, _Stored]:
    if path.suffix == ".bin":
        tensors = map_tensors(path)
        return {name: _Stored(path, tuple(t.shape), _NAMED.get(t.dtype, str(t.dtype)), t) for name, t in tensors.items()}
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            return {name: _Stored(path, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); fetch it again") from error


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a file of torch.save, mapped and not read. Raises UserError where it holds anything else."""
    try:
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be read as tensors alone, and is not loaded otherwise: {reason}") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{path}: is no mapping of names to tensors; a file of weights is")
    return found


def _check_tensors(stored: Mapping[str, _Stored], config: ModelConfig, folder: Path) -> None:
    shapes = logical_shapes(config)
    if missing := [name for name in shapes if name not in stored]:
        raise UserError(f"{folder}: tensors missing: {_listed(missing)}; config.json asks for {len(shapes)} tensors")
    # Older files carry rotary frequencies, which follow from the config, and some a copy of the tied head.
    unexpected = [name for name in stored if name not in shapes and not name.endswith("rotary_emb.inv_freq")]
    if config.tie_word_embeddings and _HEAD in unexpected:
        unexpected.remove(_HEAD)
        if not _are_equal(stored, _HEAD, _EMBEDDING):
            raise UserError(f"{folder}: tie_word_embeddings is true, but {_HEAD} differs from {_EMBEDDING}")
    if unexpected:
        raise UserError(f"{folder}: tensors that config.json has no place for: {_listed(unexpected)}")
    wrong = [f"{n} {stored[n].shape} instead of {shape}" for n, shape in shapes.items() if stored[n].shape != shape]
    if wrong:
        raise UserError(f"{folder}: shapes do not fit config.json: {_listed(wrong)}")
    wrong = [f"{name} {stored[name].dtype}" for name in shapes if stored[name].dtype not in _FLOATS]
    if wrong:
        raise UserError(f"{folder}: number types that are not plain floats: {_listed(wrong)}; allowed are {_FLOATS}")


def _are_equal(stored: Mapping[str, _Stored], name: str, other: str) -> bool:
    if stored[name].shape != stored[other].shape:
        return False
    rows, columns = stored[name].shape
    step = max(1, _COMPARED // columns)
    spans = ((start, min(start + step, rows)) for start in range(0, rows, step))
    return all(
        torch.equal(_read_rows(stored[name], name, *span), _read_rows(stored[other], other, *span)) for span in spans
    )


def _read_rows(stored: _Stored, name: str, start: int, stop: int) -> Tensor:
    if stored.data is not None:
        return stored.data[start:stop]
    with safe_open(stored.path, framework="pt") as file:
        return file.get_slice(name)[start:stop]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; name the folder of a Hugging Face checkpoint") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}; it must be a JSON object")
    return value


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def read_end_ids(folder: Path) -> list[int]:
    """The tokens with which the model of a folder ends, as its generation_config.json has them; none without one."""
    try:
        ends = json.loads((folder / "generation_config.json").read_text()).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        return []
    return [end for end in (ends if isinstance(ends, list) else [ends]) if type(end) is int]
