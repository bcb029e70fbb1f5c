"""Small LLaMAs of every kind as Hugging Face folders, and commands that are typed in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama_dist import cli

REPO = Path(__file__).resolve().parents[2]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "grouped queries": {"num_key_value_heads": 2},
    "wide heads": {"head_dim": 12, "num_key_value_heads": 1},
    "llama 3.1": {"rope_parameters": LLAMA3, "num_key_value_heads": 2, "max_position_embeddings": 256},
}


def save_theirs(folder: Path, *, dtype: torch.dtype = torch.float32, shard_size: str = "1GB", **changes: Any) -> LlamaForCausalLM:
    """A small model with random weights as Transformers saves it; returned as it is after saving."""
    values = {
        "vocab_size": 90, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(7)
    theirs = LlamaForCausalLM(LlamaConfig(**values | changes)).to(dtype).eval()
    theirs.save_pretrained(folder, max_shard_size=shard_size)
    return theirs


@torch.no_grad()
def logits(model: torch.nn.Module, *, vocab: int = 90, length: int = 100) -> torch.Tensor:
    """Of two sequences of random tokens, in float64 of float32."""
    tokens = torch.randint(vocab, (2, length), generator=torch.Generator().manual_seed(3))
    out = model(tokens)
    return (out if isinstance(out, torch.Tensor) else out.logits).double()


def typed(capsys: Any, *words: object, status: int = 0) -> str:
    """What a command prints in this process; its status must be the given one, and an error is one line."""
    capsys.readouterr()
    found = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert found == status, f"status {found}: {out}\n{err}"
    if status == 2:
        assert err.count("\n") == 1 and err.startswith(f"llama-dist {words[0]}: "), err
        return err
    assert err == "", err
    return out


def in_process(command: list[str], *, timeout: float = 120, limit: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command with this Python's packages; `limit`: options of ulimit."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    shell = ["bash", "-c", f'ulimit {limit} && exec "$@"', "-"] if limit else []
    return subprocess.run(
        shell + command, env=environment, capture_output=True, text=True, timeout=timeout, check=False, **options
    )
