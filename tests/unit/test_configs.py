"""Every shipped config: it loads, its model builds, and its parameters are as many as its source says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from llama_dist.config import (
    ModelConfig,
    dump_config,
    fit_layout,
    load_config,
    load_model_config,
    micro_batch_of,
)
from llama_dist.model.cuts import logical_shapes, num_parameters
from llama_dist.model.llama import Llama

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# From the checkpoints that were published, and from our own shapes for the last two.
PARAMETERS = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-405b": 405_853_388_800,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-3m": 3_147_456,
    "llama-tiny": 158_016,
}
WORLDS = {
    "default": 2,
    "tiny": 2,
    "llama2-7b-1node": 8,
    "llama2-7b-4nodes": 32,
    "llama2-13b-4nodes": 32,
    "llama2-70b-16nodes": 128,
    "llama2-70b-3d-16nodes": 128,
    "llama3.1-8b-128k-4nodes": 32,
}
# (dp, tp, pp, cp), ZeRO stage; of the others dp is the world, and ZeRO 3
LAYOUTS = {"llama2-70b-3d-16nodes": ((4, 8, 4, 1), 1), "llama3.1-8b-128k-4nodes": ((2, 2, 1, 8), 3)}
LLAMA2_RUNS = sorted(name for name in WORLDS if name.startswith("llama2"))


def model_path(name: str) -> Path:
    return CONFIGS / "model" / f"{name}.yaml"


def run_path(name: str) -> Path:
    return CONFIGS / "run" / f"{name}.yaml"


def test_the_tables_above_name_every_shipped_file() -> None:
    assert sorted(path.stem for path in (CONFIGS / "model").iterdir()) == sorted(PARAMETERS)
    assert sorted(path.stem for path in (CONFIGS / "run").iterdir()) == sorted(WORLDS)
    assert (len(PARAMETERS), len(WORLDS)) == (10, 8)


@pytest.mark.parametrize("name", PARAMETERS)
def test_model_has_the_published_number_of_parameters(name: str) -> None:
    config = load_model_config(model_path(name))
    with torch.device("meta"):
        model = Llama(config)
    shapes = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    assert shapes == logical_shapes(config)
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    assert num_parameters(config) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_model_file_says_its_source_and_its_parameters(name: str) -> None:
    comments = [line for line in model_path(name).read_text().splitlines() if line.startswith("#")]
    assert comments, "a model file begins with its source"
    assert f"arameters: {PARAMETERS[name]:,}" in "\n".join(comments)


def test_only_llama_3_1_stretches_the_rotary_embeddings() -> None:
    stretched: dict[str, ModelConfig] = {
        name: config for name in PARAMETERS if (config := load_model_config(model_path(name))).rope_scaling
    }
    assert sorted(stretched) == ["llama3.1-405b", "llama3.1-8b"]
    for config in stretched.values():
        assert config.rope_scaling is not None
        assert config.rope_scaling.model_dump() == {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        assert config.max_position_embeddings == 131072
        assert config.rope_theta == 500000.0


@pytest.mark.parametrize("name", WORLDS)
def test_run_fits_the_world_that_it_documents(name: str) -> None:
    run = load_config(run_path(name))
    assert run.name == name
    expected, zero = LAYOUTS.get(name, ((WORLDS[name], 1, 1, 1), 3))
    assert run.parallel.zero == zero
    documented = re.search(r"^# world: (\d+)\b", run_path(name).read_text(), flags=re.MULTILINE)
    assert documented, "a run file says in a comment `# world: N` how many ranks it is meant for"
    assert int(documented[1]) == WORLDS[name]
    layout = fit_layout(run, WORLDS[name])
    assert (layout.dp, layout.tp, layout.pp, layout.cp) == expected
    assert micro_batch_of(run, layout) == run.parallel.micro_batch


@pytest.mark.parametrize("name", WORLDS)
def test_run_survives_being_dumped(name: str, tmp_path: Path) -> None:
    run = load_config(run_path(name))
    (tmp_path / "config.yaml").write_text(dump_config(run))
    assert load_config(tmp_path / "config.yaml") == run


@pytest.mark.parametrize("name", LLAMA2_RUNS)
def test_llama2_runs_have_the_published_hyperparameters(name: str) -> None:
    run = load_config(run_path(name))
    tokens_a_step = run.train.global_batch * run.data.seq_len
    assert tokens_a_step == 4_194_304
    assert abs(tokens_a_step * run.train.steps - 2e12) < tokens_a_step
    assert run.optim.lr == (1.5e-4 if "70b" in name else 3e-4)
    assert (run.optim.schedule, run.optim.warmup_steps, run.optim.min_lr_ratio) == ("cosine", 2000, 0.1)
    assert (run.optim.betas, run.optim.eps) == ((0.9, 0.95), 1e-5)
    assert (run.optim.weight_decay, run.optim.grad_clip) == (0.1, 1.0)
    assert (run.train.precision, run.data.seq_len) == ("bf16", run.model.max_position_embeddings)
    assert num_parameters(run.model) == PARAMETERS["-".join(name.split("-")[:2])]
