"""Weights in and out: Transformers and we give the same logits and ids, from every layout; what is wrong is said."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_helpers import saved_layout, save_as, state_at, tiny_model
from exchange_helpers import KINDS, in_process, logits, save_theirs, typed
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llama_dist.checkpoint.store import load_pieces
from llama_dist.checkpoint.whole import find_checkpoint, load_model, read_whole
from llama_dist.config import load_model_config
from llama_dist.errors import UserError
from llama_dist.exchange import weights as weights_module
from llama_dist.exchange.exporting import split_tensors
from llama_dist.exchange.weights import open_weights, rows_of
from llama_dist.layout import Layout
from llama_dist.model.hf import load_hf_config

EXACT = {"rtol": 0, "atol": 1e-5}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_goes_in_and_out_with_its_logits(tmp_path: Path, capsys: Any, kind: str) -> None:
    theirs = save_theirs(tmp_path / "theirs", **KINDS[kind])
    typed(capsys, "import", tmp_path / "theirs", "--to", tmp_path / "ours")
    ours = load_model(find_checkpoint(tmp_path / "ours")[0])
    torch.testing.assert_close(logits(ours), logits(theirs), **EXACT)
    assert load_model_config(tmp_path / "ours/model.yaml") == load_hf_config(tmp_path / "theirs")
    typed(capsys, "export", tmp_path / "ours", "--to", tmp_path / "back", "--no-tokenizer")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert back.dtype == torch.float32
    torch.testing.assert_close(logits(back), logits(theirs), **EXACT)
    # The bits too, and nothing of the config that the model depends on.
    before, after = load_file(tmp_path / "theirs/model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert load_hf_config(tmp_path / "back") == load_hf_config(tmp_path / "theirs")


LAYOUTS = [
    (Layout(1), 3, 1),
    (Layout(3), 1, 1),
    (Layout(2), 3, 1),
    (Layout(1, tp=2), 2, 1),
    (Layout(2, tp=4), 3, 1),
    (Layout(1, pp=2), 1, 1),
    (Layout(2, tp=2, pp=2), 1, 1),
    (Layout(1, tp=2, pp=2), 3, 2),
    (Layout(2, cp=2), 2, 1),
]


@pytest.mark.parametrize(("layout", "zero", "virtual"), LAYOUTS)
@pytest.mark.parametrize("tied", [False, True])
def test_any_layouts_checkpoint_is_exported(tmp_path: Path, layout: Layout, zero: int, virtual: int, tied: bool) -> None:
    model = tiny_model(
        vocab_size=12, hidden_size=8, intermediate_size=12, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    saved = saved_layout(model, layout, zero=zero, virtual=virtual)
    where = save_as(tmp_path / "run/checkpoints", 5, saved)
    weights, passed_over = open_weights(where)
    assert passed_over == []
    expected = state_at(5, saved)
    for name, shape in weights.tensors().items():
        parts = [weights.read(name, start, min(start + 3, shape[0])) for start in range(0, shape[0], 3)]
        assert torch.equal(torch.cat(parts), expected[name]), name
    status = in_process([sys.executable, "-m", "llama_dist", "export", str(tmp_path / "run"), "--to", str(tmp_path / "out"),
                         "--no-tokenizer", "--max-shard-gb", "1e-6"]) if layout.world == 8 else None  # fmt: skip
    if status:  # whole commands for the widest alone: a process each takes seconds
        assert status.returncode == 0, status.stderr
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 4 * sum(map(torch.numel, (expected[n] for n in weights.tensors())))
        stored = {name: load_file(tmp_path / "out" / file)[name] for name, file in index["weight_map"].items()}
        assert stored.keys() == weights.tensors().keys()
        assert all(torch.equal(stored[name], expected[name]) for name in stored)
        back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        torch.testing.assert_close(
            logits(back, vocab=12, length=8), logits(load_model(read_whole(where)), vocab=12, length=8), **EXACT
        )


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_smaller_types_round_once(tmp_path: Path, capsys: Any, name: str, dtype: torch.dtype) -> None:
    theirs = save_theirs(tmp_path / "theirs")
    typed(capsys, "export", tmp_path / "theirs", "--to", tmp_path / "small", "--dtype", name, "--no-tokenizer")
    stored = load_file(tmp_path / "small/model.safetensors")
    for tensor, parameter in theirs.named_parameters():
        assert torch.equal(stored[tensor], parameter.detach().to(dtype)), tensor
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_stored_smaller_comes_in_exactly(tmp_path: Path, capsys: Any, dtype: torch.dtype) -> None:
    theirs = save_theirs(tmp_path / "theirs", dtype=dtype, shard_size="8KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 2
    typed(capsys, "import", tmp_path / "theirs", "--to", tmp_path / "ours")
    ours = load_model(find_checkpoint(tmp_path / "ours")[0])
    expected = dict(theirs.named_parameters())
    assert all(torch.equal(p, expected[name].float()) for name, p in ours.named_parameters())


def test_blocks_of_any_size_write_the_same(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    save_theirs(tmp_path / "theirs")
    typed(capsys, "import", tmp_path / "theirs", "--to", tmp_path / "once")
    monkeypatch.setattr(weights_module, "BLOCK", 70)
    typed(capsys, "import", tmp_path / "theirs", "--to", tmp_path / "often")
    typed(capsys, "export", tmp_path / "once", "--to", tmp_path / "out", "--no-tokenizer")
    name = "checkpoints/step-00000000/rank-00000.bin"
    assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "often" / name).read_bytes()
    assert typed(capsys, "diff", tmp_path / "once", tmp_path / "out").endswith("equal: all 21 tensors, bit for bit\n")


def test_rows_are_cut_into_blocks_of_whole_heads() -> None:
    assert list(rows_of((10, weights_module.BLOCK // 4))) == [(0, 4), (4, 8), (8, 10)]
    assert list(rows_of((12, weights_module.BLOCK // 4), multiple=3)) == [(0, 3), (3, 6), (6, 9), (9, 12)]
    assert list(rows_of((2, 3 * weights_module.BLOCK))) == [(0, 1), (1, 2)]


def test_shards_are_filled_in_order_and_a_larger_tensor_has_its_own() -> None:
    shapes = {"a": (3,), "b": (2,), "c": (9,), "d": (1,)}
    assert split_tensors(shapes, itemsize=4, shard_bytes=20) == [["a", "b"], ["c"], ["d"]]
    assert split_tensors(shapes, itemsize=2, shard_bytes=1000) == [["a", "b", "c", "d"]]


MEMORY = """
import sys, threading, time
from llama_dist import cli
peak, done = [0], threading.Event()
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())
import llama_dist.commands.import_, llama_dist.commands.export, llama_dist.commands.diff, torch
torch.ones(4).add_(1)
before = anonymous()
threading.Thread(target=watch, daemon=True).start()
status = cli.main(sys.argv[1:])
done.set()
print("GREW", peak[0] - before)
sys.exit(status)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_never_more_than_a_part_of_the_model_is_in_memory(tmp_path: Path) -> None:
    """512 MiB of weights, in tensors of 250 MiB; blocks of 32 MiB, each some times over."""
    theirs = tmp_path / "theirs"
    save_theirs(theirs, vocab_size=128_000, hidden_size=512, intermediate_size=64, num_hidden_layers=1)
    steps = [
        ("import", theirs, "--to", tmp_path / "ours"),
        ("export", tmp_path / "ours", "--to", tmp_path / "out", "--no-tokenizer", "--dtype", "bf16"),
        ("diff", tmp_path / "ours", theirs),
    ]
    for words in steps:
        done = in_process([sys.executable, "-c", MEMORY, *map(str, words)], timeout=200)
        assert done.returncode == 0, done.stderr
        grew = int(done.stdout.rsplit("GREW", 1)[1]) / 1024
        assert grew < 230, f"{words[0]} took {grew:.0f} MiB"


def spoiled(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edited(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


NORM = "model.norm.weight"
WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda f: spoiled(f, lambda t: t.pop(NORM)), "tensors missing: model.norm.weight"),
    "shape": (lambda f: spoiled(f, lambda t: t.update({NORM: torch.ones(5)})), "model.norm.weight (5,) instead of (32,)"),
    "foreign": (lambda f: edited(f, architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel"),
    "biases": (lambda f: edited(f, attention_bias=True), "attention_bias is True"),
    "quantised": (lambda f: edited(f, quantization_config={"bits": 4}), "quantization_config"),
    "not finite": (lambda f: spoiled(f, lambda t: t[NORM].fill_(float("nan"))), "not finite"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    "cut": (lambda f: os.truncate(f / "model.safetensors", 3000), "not a whole safetensors file"),
    "deepspeed": (lambda f: [(f / "config.json").unlink(), (f / "latest").touch()], "zero_to_fp32.py"),
    "megatron": (
        lambda f: [(f / "config.json").unlink(), (f / "latest_checkpointed_iteration.txt").touch()], "Megatron-LM"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_imported_is_said_and_nothing_is_left(tmp_path: Path, capsys: Any, case: str) -> None:
    save_theirs(tmp_path / "theirs")
    spoil, said = WRONG[case]
    spoil(tmp_path / "theirs")
    assert said in typed(capsys, "import", tmp_path / "theirs", "--to", tmp_path / "ours", status=2)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_nothing_is_written_over(tmp_path: Path, capsys: Any) -> None:
    save_theirs(tmp_path / "theirs")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    for words in (("import", tmp_path / "theirs"), ("export", tmp_path / "theirs", "--no-tokenizer")):
        assert "is there already" in typed(capsys, *words, "--to", tmp_path / "full", status=2)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    typed(capsys, "import", tmp_path / "theirs", "--to", tmp_path / "empty")
    assert "needs no import" in typed(capsys, "import", tmp_path / "empty", "--to", tmp_path / "twice", status=2)


@pytest.mark.parametrize("to", ["ours", "out", "out.gguf"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, shared_data: Path, to: str) -> None:
    """A limit on the size of files, of 100 KiB, fails writes as a full disk does."""
    pytest.importorskip("gguf")
    theirs = shared_data / "checkpoints/stories260K/hf"
    words = ["import" if to == "ours" else "export", str(theirs), "--to", str(tmp_path / to)]
    done = in_process([sys.executable, "-m", "llama_dist", *words], limit="-f 100")
    assert done.returncode == 2 and "what was begun is deleted" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_values_that_do_not_fit_are_named(tmp_path: Path, capsys: Any) -> None:
    save_theirs(tmp_path / "theirs")
    spoiled(tmp_path / "theirs", lambda t: t[NORM].fill_(1e5))
    words = ("export", tmp_path / "theirs", "--to", tmp_path / "out", "--dtype", "fp16", "--no-tokenizer")
    said = typed(capsys, *words, status=2)
    assert NORM in said and "100000" in said and "65504" in said
    assert not (tmp_path / "out").exists()


def test_imported_weights_are_read_as_any_checkpoint(tmp_path: Path, capsys: Any, shared_data: Path) -> None:
    theirs = shared_data / "checkpoints/stories260K/hf"
    told = typed(capsys, "import", theirs, "--to", tmp_path / "ours")
    assert f"folder={tmp_path / 'ours'} model={tmp_path / 'ours/model.yaml'}" in told
    manifest = find_checkpoint(tmp_path / "ours")[0].manifest
    assert manifest["config"].keys() == {"model"} and manifest["imported"]["from"] == str(theirs)
    assert manifest["layout"]["states"] == [""] and manifest["step"] == manifest["samples"] == 0
    words = ("generate", "Once upon a time", "--max-new-tokens", 30, "--checkpoint")
    assert typed(capsys, *words, tmp_path / "ours") == typed(capsys, *words, theirs)
    assert typed(capsys, "verify", tmp_path / "ours").count("whole") == 1


def test_a_read_that_fails_is_an_error_of_the_storage(tmp_path: Path) -> None:
    saved = saved_layout(tiny_model(), Layout(1))
    where = save_as(tmp_path / "checkpoints", 5, saved)
    weights, _ = open_weights(where)
    os.truncate(where / "rank-00000.bin", 8)
    with pytest.raises(UserError, match="rank-00000.bin"):
        weights.read("model.norm.weight", 0, 7)
    assert load_pieces  # the same path that a run's start takes
