"""Committed checkpoints: what is saved is loaded; what is not whole is named and never loaded. See test_store_kills."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_helpers import (
    ALONE,
    assert_holds,
    assert_loads,
    blank,
    names_in,
    pieces_of,
    save,
    save_as,
    saved_layout,
    state_at,
    tiny_model,
)

from llama_dist.boxes import Box
from llama_dist.checkpoint.dcp import NotFiniteError
from llama_dist.checkpoint.places import COMMITTED, MANIFEST, LocalPlace
from llama_dist.checkpoint.saving import SaveError, save_checkpoint
from llama_dist.checkpoint.store import (
    FORMAT,
    Checkpoint,
    Position,
    load_pieces,
    needed_ranks,
    newest_valid,
    read_checkpoint,
    seal,
    verify,
)
from llama_dist.errors import UserError
from llama_dist.layout import Layout


def committed(folder: Path) -> list[str]:
    return LocalPlace(folder).names()


def read(path: Path) -> Checkpoint:
    return read_checkpoint(LocalPlace(path.parent), path.name)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    assert path == tmp_path / "step-00000003"
    assert names_in(path) == [MANIFEST, "rank-00000.bin"]
    assert_loads(tmp_path, {3})
    save(tmp_path, 12)
    assert_loads(tmp_path, {12})
    assert committed(tmp_path) == ["step-00000012", "step-00000003"]


def test_what_many_ranks_saved_is_loaded_by_one(tmp_path: Path) -> None:
    layouts = (Layout(3), Layout(1, tp=2, pp=2), Layout(2, cp=2, pp=2))
    for step, (layout, zero) in enumerate(((layout, zero) for layout in layouts for zero in (1, 3)), start=1):
        sizes = {"num_hidden_layers": 2, "vocab_size": 12, "intermediate_size": 6, "num_attention_heads": 2}
        model = tiny_model(**sizes, tie_word_embeddings=step % 2 == 0)
        path = save_as(tmp_path, step, saved_layout(model, layout, zero=zero))
        assert len(names_in(path)) == layout.world + 1
        assert verify(read(path)) == []
        assert assert_holds(read(path)) == step


def test_no_folder_and_an_empty_one_are_a_fresh_start(tmp_path: Path) -> None:
    assert newest_valid(LocalPlace(tmp_path / "none")) == (None, [])
    assert newest_valid(LocalPlace(tmp_path)) == (None, [])


def test_a_state_that_is_no_number_is_not_saved(tmp_path: Path) -> None:
    save(tmp_path, 10)
    for bad in (torch.nan, torch.inf, -torch.inf):
        state = state_at(20)
        state["optimizer.exp_avg_sq.model.norm.weight"][3] = bad
        told = "step-00000020: not saved: optimizer.exp_avg_sq.model.norm.weight holds values that are not finite"
        with pytest.raises(NotFiniteError, match=told):
            save_checkpoint(
                LocalPlace(tmp_path), Position(20), pieces_of(state), state={}, attempt=1, group=None
            )
    assert names_in(tmp_path) == ["step-00000010"]


def test_what_may_not_be_committed_is_not(tmp_path: Path) -> None:
    save(tmp_path, 10)
    with pytest.raises(SaveError, match="step-00000020: not saved: attempt 3 has taken over"):
        save_checkpoint(
            LocalPlace(tmp_path),
            Position(20),
            pieces_of(state_at(20)),
            state={},
            attempt=2,
            group=None,
            may_commit=lambda: "attempt 3 has taken over",
        )
    assert names_in(tmp_path) == ["step-00000010"]


# Damage.


def damaged(path: Path, change: str) -> None:
    if change == "missing":
        path.unlink()
    elif change == "truncated":
        os.truncate(path, path.stat().st_size - 1)
    elif change == "longer":
        path.write_bytes(path.read_bytes() + b"}")
    elif change == "empty":
        path.write_bytes(b"")
    elif change == "garbage":
        path.write_bytes(b"[]")
    elif change == "a folder":
        path.unlink()
        path.mkdir()
    else:
        data = bytearray(path.read_bytes())
        data[int(change)] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("file", ["rank-00000.bin", "rank-00002.bin", MANIFEST])
@pytest.mark.parametrize(
    "change", ["missing", "truncated", "longer", "empty", "garbage", "a folder", "0", "20", "-3"]
)
def test_any_damage_is_named_and_passed_over(tmp_path: Path, file: str, change: str) -> None:
    save(tmp_path, 10)
    path = save_as(tmp_path, 20, saved_layout(tiny_model(), Layout(3))) / file
    damaged(path, change)
    checkpoint, passed_over = newest_valid(LocalPlace(tmp_path))
    assert checkpoint is not None and checkpoint.position.step == 10
    assert len(passed_over) == 1
    assert passed_over[0].startswith(f"{path}: ")
    assert_loads(tmp_path, {10})


def test_the_fast_check_looks_at_sizes_only(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    assert verify(read(path), full=False) == []
    assert newest_valid(LocalPlace(tmp_path), full=False)[1] == []
    damaged(path / "rank-00000.bin", "20")
    assert verify(read(path), full=False) == [] and verify(read(path)) != []
    for change in ("truncated", "empty", "longer", "missing"):
        damaged(path / "rank-00000.bin", change)
        (problem,) = verify(read(path), full=False)
        assert problem.startswith(f"{path}/rank-00000.bin: ")


def test_every_single_bit_of_the_manifest_counts(tmp_path: Path) -> None:
    """A bit that changes no meaning, as the e of 1e-05, may change."""
    path = save(tmp_path, 10) / MANIFEST
    good = path.read_bytes()
    harmless = 0
    for at in range(8 * len(good)):
        data = bytearray(good)
        data[at // 8] ^= 1 << (at % 8)
        path.write_bytes(data)
        try:
            found = json.loads(data)
        except ValueError:
            found = None
        if found == json.loads(good):
            harmless += 1
            continue
        with pytest.raises(ValueError, match=MANIFEST):
            read(path.parent)
    assert harmless < 3
    path.write_bytes(good)
    read(path.parent)


def test_damage_says_what_was_expected_and_found(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    checkpoint, file = read(path), path / "rank-00000.bin"
    record = checkpoint.manifest["files"]["rank-00000.bin"]
    assert record["bytes"] == ALONE.file_size(0)
    assert verify(checkpoint) == []
    damaged(file, "truncated")
    assert verify(checkpoint) == [f"{file}: has {record['bytes'] - 1} bytes, expected {record['bytes']}"]
    damaged(file, "longer")  # as long as before, and another byte
    damaged(file, "-1")
    (problem,) = verify(checkpoint)
    assert re.fullmatch(rf"{file}: xxh3-128 is \w+, expected {record['xxh3_128']}", problem)


def test_verification_is_shared_out_among_ranks(tmp_path: Path) -> None:
    path = save_as(tmp_path, 10, saved_layout(tiny_model(), Layout(3)))
    for rank in (0, 2):
        damaged(path / f"rank-0000{rank}.bin", "missing")
    parts = [verify(read(path), part=part, parts=3) for part in range(3)]
    assert sorted(map(len, parts)) == [0, 1, 1]
    assert sorted(sum(parts, [])) == sorted(verify(read(path)))


def test_when_none_verifies_it_is_never_a_fresh_start(tmp_path: Path) -> None:
    for step in (10, 20):
        damaged(save(tmp_path, step) / "rank-00000.bin", "0")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="none of its 2 checkpoints verifies") as error:
        newest_valid(LocalPlace(tmp_path))
    assert all(f"step-000000{step}" in str(error.value) for step in (10, 20))
    assert sorted(tmp_path.rglob("*")) == before


NEWER: list[dict[str, Any]] = [
    {"format": 99, "versions": {"llama_dist": "9.9"}},
    {"format": 99},
    {"format": 99, "versions": "9.9"},
    {"format": 99, "versions": ["9.9"]},
    {"format": 99, "checksum": {"another": "way"}},
    {"format": "99"},
]


@pytest.mark.parametrize("head", NEWER, ids=str)
@pytest.mark.parametrize("like_ours", [True, False])
def test_a_newer_format_is_named_and_never_believed(tmp_path: Path, head: dict[str, Any], like_ours: bool) -> None:
    """Even where all that this version knows of it is there and right."""
    save(tmp_path, 10)
    path = save(tmp_path, 20) / MANIFEST
    body = json.loads(path.read_text())
    del body["checksum"], body["versions"]
    path.write_bytes(seal(body | head) if like_ours else json.dumps(head).encode())
    by = "9.9" if head.get("versions") == {"llama_dist": "9.9"} else "another version"
    told = f"{path}: format 99, written by llama_dist {by}; this version reads format {FORMAT}"
    with pytest.raises(ValueError) as error:
        read(path.parent)
    assert str(error.value) == told
    checkpoint, passed_over = newest_valid(LocalPlace(tmp_path))
    assert checkpoint is not None and checkpoint.position.step == 10 and passed_over == [told]
    shutil.rmtree(tmp_path / "step-00000010")
    with pytest.raises(UserError, match="none of its 1 checkpoints verifies.*format 99, written by"):
        newest_valid(LocalPlace(tmp_path))


@pytest.mark.parametrize("body", [{}, {"format": FORMAT}, {"format": FORMAT, "step": 20, "samples": 160}], ids=str)
def test_a_manifest_that_says_too_little_is_damage(tmp_path: Path, body: dict[str, Any]) -> None:
    """Sealed as it should be, by whatever wrote it."""
    save(tmp_path, 10)
    (tmp_path / "step-00000020").mkdir()
    (tmp_path / "step-00000020" / MANIFEST).write_bytes(seal(body))
    checkpoint, passed_over = newest_valid(LocalPlace(tmp_path))
    assert checkpoint is not None and checkpoint.position.step == 10
    assert len(passed_over) == 1 and f"step-00000020/{MANIFEST}: " in passed_over[0]


def test_a_checkpoint_under_another_name_is_damage(tmp_path: Path) -> None:
    """A copy under a later name would otherwise stand for a step that was never reached, and outlive the real one."""
    save(tmp_path, 10)
    shutil.copytree(tmp_path / "step-00000010", tmp_path / "step-00000099")
    checkpoint, passed_over = newest_valid(LocalPlace(tmp_path))
    assert checkpoint is not None and checkpoint.position.step == 10
    assert passed_over == [
        f"{tmp_path / 'step-00000099'}: holds the checkpoint step-00000010; somebody renamed or copied it"
    ]


def test_a_manifest_nested_without_end_is_damage(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    (tmp_path / "step-00000020" / MANIFEST).write_text("[" * 200_000)
    checkpoint, passed_over = newest_valid(LocalPlace(tmp_path))
    assert checkpoint is not None and checkpoint.position.step == 10 and len(passed_over) == 1


def test_leftovers_are_deleted_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path, 10)
    for name in ("step-00000020.partial-3", "step-00000005.pruned", "notes", "step-1.partial-2", "step-00000030.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    elsewhere = tmp_path.parent / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "step-00000006.pruned").symlink_to(elsewhere)
    (tmp_path / "step-00000007.pruned").write_text("a file, not a folder")
    assert LocalPlace(tmp_path).sweep() == []
    assert elsewhere.is_dir()
    assert names_in(tmp_path) == ["notes", "step-00000010", "step-00000030.old", "step-1.partial-2"]
    assert_loads(tmp_path, {10})
    assert LocalPlace(tmp_path / "none").sweep() == []


# Nothing runs code.


def test_no_file_is_a_pickle_and_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, 10)
    json.loads((path / MANIFEST).read_text())
    raw = b"".join(piece.data.numpy().tobytes() for piece in pieces_of(state_at(10)))
    assert (path / "rank-00000.bin").read_bytes() == raw, "raw float32 and nothing else"

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert_loads(tmp_path, {10})


def test_another_models_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = read(save(tmp_path, 10))
    norm = "model.norm.weight"
    for name, shape, told in (("head", (2, 2), "no tensor 'head'"), (norm, (6,), "shape (7,), the model (6,)")):
        with pytest.raises(UserError) as error:
            load_pieces(checkpoint, [blank(name, shape)])
        assert told in str(error.value)
        assert str(error.value).startswith(f"{tmp_path}/step-00000010: does not fit this run: ")


def test_a_file_that_is_cut_short_or_gone_after_the_check_is_one_clear_error(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    checkpoint, name = read(path), "lm_head.weight"
    whole, columns = blank(name, (11, 7)), blank(name, (11, 7), Box((0, 1), (11, 3)))
    for change in ("empty", "missing"):
        damaged(path / "rank-00000.bin", change)
        for piece in (whole, columns):
            with pytest.raises(UserError, match=rf"{path}: .*rank-00000.bin"):
                load_pieces(checkpoint, [piece])


def test_a_layout_that_does_not_fit_the_model_is_one_clear_error(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    body = json.loads((path / MANIFEST).read_text())
    del body["checksum"]
    for layout in ({"dp": 1}, {**body["layout"], "layers": [3]}):
        (path / MANIFEST).write_bytes(seal(body | {"layout": layout}))
        with pytest.raises(UserError, match="is no layout of a model"):
            load_pieces(read(path), [blank("lm_head.weight", (11, 7))])


def test_ranks_that_are_needed_are_few(tmp_path: Path) -> None:
    saved = saved_layout(tiny_model(), Layout(8))
    checkpoint = read(save_as(tmp_path, 10, saved))
    first = blank("lm_head.weight", (11, 7), Box((0, 0), (1, 7)))
    everything = [blank(name, shape) for name, shape in saved.tensors()]
    assert needed_ranks(checkpoint, [first]) == {0}
    assert needed_ranks(checkpoint, everything) == set(range(8))
