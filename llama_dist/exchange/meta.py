"""Meta's own checkpoints: params.json and consolidated.NN.pth, one file a tensor-parallel rank of theirs.

The files are pickles; torch reads them with `weights_only`, which builds tensors and runs nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from llama_dist.config import ModelConfig, RopeScaling
from llama_dist.errors import UserError
from llama_dist.model.cuts import logical_shapes
from llama_dist.model.hf import map_tensors

PARAMS = "params.json"

_TOP = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}
LLAMA3_VOCAB = 128_000
# Positions that the generations were trained on, of which params.json says nothing.
POSITIONS, POSITIONS_3, POSITIONS_3_1 = 4096, 8192, 131_072
_KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class MetaWeights:
    """The weights in a folder as Meta publishes LLaMA 2 and 3, under our names, read by rows.

    Raises UserError naming what is missing, or cannot be represented.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.where = str(folder)
        self.files = sorted(folder.glob("consolidated.*.pth"))
        if not self.files:
            raise UserError(f"{folder}: has {PARAMS} and no consolidated.*.pth; the weights must be there")
        params = _read_params(folder / PARAMS)
        self._shards = [map_tensors(path) for path in self.files]
        self.model = _model_of(params, self._shards, folder / PARAMS)
        self._check()

    @property
    def dtype(self) -> str:
        """What the weights are stored in, as safetensors calls it: "BF16"."""
        return _KINDS[self._shards[0]["norm.weight"].dtype]

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor, in model order."""
        return logical_shapes(self.model)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, float32."""
        rows = torch.arange(start, stop)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            rows = _meta_rows(rows, self.model.head_dim)
        total, *columns = self.tensors()[name]
        parts = [shard[_meta_name(name)] for shard in self._shards]
        if list(parts[0].shape[1:]) != columns:  # cut along the columns
            return torch.cat([part[rows] for part in parts], dim=1).float()
        if not columns or len(parts) == 1:
            return parts[0][rows].float()
        # Cut along the rows; a key/value head that several ranks share is in each of their files.
        each = parts[0].shape[0]
        owners = parts[:: each * len(parts) // total]
        out = torch.empty((len(rows), *columns))
        for i, part in enumerate(owners):
            mine = (rows // each) == i
            out[mine] = part[rows[mine] - i * each].float()
        return out

    def _check(self) -> None:
        shapes, count = self.tensors(), len(self._shards)
        known = {_meta_name(name) for name in shapes} | {"rope.freqs", _TOP["lm_head.weight"]}
        for path, shard in zip(self.files, self._shards, strict=True):
            missing = [name for name in map(_meta_name, shapes) if name not in shard]
            foreign = [name for name in shard if name not in known]
            if missing:
                raise UserError(f"{path}: tensors missing: {', '.join(missing[:5])}; {PARAMS} asks for them")
            if foreign:
                raise UserError(f"{path}: tensors that LLaMA 2 and 3 have not: {', '.join(foreign[:5])}")
            for name, shape in shapes.items():
                found = tuple(shard[_meta_name(name)].shape)
                if not _fits(found, shape, count):
                    raise UserError(
                        f"{path}: {_meta_name(name)} has shape {found}, which is no part of {shape} in {count} file(s); "
                        f"all of the consolidated.*.pth and their own {PARAMS} must be in the folder"
                    )
                if shard[_meta_name(name)].dtype not in _KINDS:
                    raise UserError(f"{path}: {_meta_name(name)} is {shard[_meta_name(name)].dtype}; plain floats only")


def _fits(found: tuple[int, ...], shape: tuple[int, ...], count: int) -> bool:
    if len(shape) == 1 or count == 1:
        return found == shape
    by_columns = found == (shape[0], shape[1] // count) and shape[1] % count == 0
    rows = found[0] * count
    return by_columns or (found[1:] == shape[1:] and rows >= shape[0] and rows % shape[0] == 0)


def _meta_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    _, _, number, rest = name.split(".", 3)
    return f"layers.{number}.{_IN_LAYER[rest.removesuffix('.weight')]}.weight"


def _meta_rows(rows: Tensor, head_dim: int) -> Tensor:
    """Where rows of our queries and keys lie in Meta's, who rotate neighbours and not the two halves of a head."""
    head, within = rows // head_dim, rows % head_dim
    half, pair = within // (head_dim // 2), within % (head_dim // 2)
    return head * head_dim + 2 * pair + half


def _read_params(path: Path) -> dict[str, Any]:
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    missing = [name for name in ("dim", "n_layers", "n_heads") if not isinstance(params.get(name), int)]
    if missing:
        raise UserError(f"{path}: {', '.join(missing)} missing; Meta's LLaMA 2 and 3 have dim, n_layers and n_heads")
    if params.get("moe_args") or params.get("vision_chunk_size") or params.get("quantization_args"):
        raise UserError(f"{path}: is of a model with experts, images or quantised weights; LLaMA 2 and 3 can be read")
    return params


def _model_of(params: dict[str, Any], shards: list[dict[str, Tensor]], path: Path) -> ModelConfig:
    first, dim, count = shards[0], params["dim"], len(shards)
    for name in ("tok_embeddings.weight", "norm.weight", "layers.0.feed_forward.w1.weight"):
        if name not in first:
            raise UserError(f"{path.with_name('consolidated.00.pth')}: tensors missing: {name}")
    embedding = first["tok_embeddings.weight"]
    vocab = embedding.shape[0] * (1 if embedding.shape[1] * count == dim else count)
    fields: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": dim,
        "intermediate_size": first["layers.0.feed_forward.w1.weight"].shape[0] * count,
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
        "rms_norm_eps": params.get("norm_eps", 1e-5),
        "rope_theta": float(params.get("rope_theta", 10000.0)),
        "tie_word_embeddings": "output.weight" not in first or _is_tied(shards),
        "max_position_embeddings": POSITIONS_3 if vocab >= LLAMA3_VOCAB else POSITIONS,
    }
    if params.get("use_scaled_rope"):
        fields["max_position_embeddings"] = POSITIONS_3_1
        fields["rope_scaling"] = RopeScaling(
            factor=float(params.get("rope_scaling_factor") or 8.0),
            low_freq_factor=1.0,
            high_freq_factor=float(params.get("rope_high_freq_factor") or 4.0),
            original_max_position_embeddings=POSITIONS_3,
        )
    try:
        return ModelConfig(**fields)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UserError(f"{path}: {wrong}") from error


def _is_tied(shards: list[dict[str, Tensor]]) -> bool:
    """Whether the head is a copy of the embedding, as in LLaMA 3.2 1B and 3B."""
    pairs = [(shard["output.weight"], shard["tok_embeddings.weight"]) for shard in shards]
    return all(head.shape == rows.shape and torch.equal(head, rows) for head, rows in pairs)
