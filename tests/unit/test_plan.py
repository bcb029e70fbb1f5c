"""Where every element of a checkpoint lies follows from the layout: each once, where readers look, and fast."""

from __future__ import annotations

import itertools
import json
import random
import time
from math import prod

import numpy as np
import pytest
from checkpoint_helpers import saved_layout, state_at, tiny_model

from llama_dist.boxes import Box
from llama_dist.checkpoint.pieces import check_coverage
from llama_dist.checkpoint.plan import STATES, SavedLayout, split_name, state_name
from llama_dist.config import ModelConfig
from llama_dist.layout import Layout, split_layers

SIZES = (1, 2, 4, 8)
LAYOUTS = [Layout(*sizes) for sizes in itertools.product(SIZES, repeat=4) if prod(sizes) <= 16]


def model_for(layout: Layout, *, virtual: int, tied: bool, kv_heads: int) -> ModelConfig:
    """Sizes that tensor parallelism can cut, and that the replicas do not divide; one layer more than chunks."""
    return tiny_model(
        num_hidden_layers=layout.pp * virtual + 1,
        vocab_size=layout.tp * 3,
        intermediate_size=layout.tp * 5,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        head_dim=2,
        hidden_size=7,
        tie_word_embeddings=tied,
    )


def saved_for(layout: Layout, *, zero: int, virtual: int = 1, tied: bool = False, kv_heads: int = 2) -> SavedLayout:
    model = model_for(layout, virtual=virtual, tied=tied, kv_heads=kv_heads)
    return saved_layout(model, layout, zero=zero, virtual=virtual)


def some_layouts(count: int) -> list[SavedLayout]:
    chosen = random.Random(5)
    return [
        saved_for(
            chosen.choice(LAYOUTS),
            zero=chosen.choice((1, 2, 3)),
            virtual=chosen.choice((1, 2, 3)),
            tied=chosen.random() < 0.5,
            kv_heads=chosen.choice(SIZES),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_every_element_is_in_one_file_under_any_layout(zero: int, tied: bool) -> None:
    assert len(LAYOUTS) == 66
    copies = 0
    for i, layout in enumerate(LAYOUTS):
        saved = saved_for(layout, zero=zero, tied=tied, virtual=1 + i % 3, kv_heads=SIZES[i % 4])
        boxes: dict[str, list[Box]] = {}
        for rank in range(layout.world):
            for held in saved.held(rank):
                assert 0 <= held.start < held.stop <= held.slice_.box.numel
                copies += not held.slice_.owner
                if held.slice_.owner:
                    boxes.setdefault(held.name, []).extend(held.boxes)
        assert boxes.keys() == saved.shapes.keys()
        for name, shape in saved.shapes.items():
            check_coverage(name, shape, boxes[name])
    assert copies > 1000


def files_of(saved: SavedLayout, state: dict[str, np.ndarray]) -> list[np.ndarray]:
    """What every rank writes, by nothing but what it holds."""
    files = []
    for rank in range(saved.layout.world):
        own = [held for held in saved.held(rank) if held.slice_.owner]
        parts = [
            state[state_name(of, held.name)][held.slice_.box.slices].reshape(-1)[held.start : held.stop]
            for of in saved.states
            for held in own
        ]
        files.append(np.concatenate([np.empty(0, dtype=np.float32), *parts]))
    return files


def random_box(shape: tuple[int, ...], chosen: random.Random) -> Box:
    offset = tuple(chosen.randrange(size) for size in shape)
    return Box(offset, tuple(chosen.randint(1, size - at) for size, at in zip(shape, offset, strict=True)))


def test_any_box_is_found_where_the_ranks_wrote_it() -> None:
    chosen = random.Random(1)
    found_in = set()
    for saved in some_layouts(60):
        state = {name: tensor.numpy() for name, tensor in state_at(3, saved).items()}
        files = files_of(saved, state)
        assert [file.nbytes for file in files] == [saved.file_size(rank) for rank in range(saved.layout.world)]
        assert sum(file.nbytes for file in files) == 4 * sum(prod(shape) for _, shape in saved.tensors())
        for name, shape in saved.tensors():
            for box in (Box((0,) * len(shape), shape), random_box(shape, chosen), random_box(shape, chosen)):
                count = np.zeros(shape, dtype=int)
                stored = saved.stored(name, box)
                for one in stored:
                    start, rest = divmod(one.start, 4)
                    assert rest == 0
                    values = files[one.rank][start : start + one.box.numel].reshape(one.box.shape)
                    assert np.array_equal(values, state[name][one.box.slices])
                    before = count[box.slices].sum()
                    count[one.box.slices] += 1
                    assert count[box.slices].sum() > before, "a stored box that has nothing of the one asked for"
                assert (count[box.slices] == 1).all()
                found_in.add(len(stored))
    assert max(found_in) >= 16 and min(found_in) == 1


def test_the_files_hold_state_after_state() -> None:
    """A reader of the weights alone reads the front of each file, and the moments lie like the weights."""
    saved = saved_for(Layout(2, tp=2), zero=1)
    sizes = [saved.file_size(rank) // len(STATES) for rank in range(4)]
    for name, shape in saved.shapes.items():
        whole = Box((0,) * len(shape), shape)
        for one, first, second in zip(*(saved.stored(state_name(of, name), whole) for of in STATES), strict=True):
            assert (one.box, one.rank) == (first.box, first.rank) == (second.box, second.rank)
            assert one.start + 4 * one.box.numel <= sizes[one.rank]
            assert first.start == one.start + sizes[one.rank] and second.start == one.start + 2 * sizes[one.rank]


def test_a_checkpoint_of_weights_has_no_moments() -> None:
    model = tiny_model()
    whole, weights = saved_layout(model, Layout(2)), saved_layout(model, Layout(2), states=("",))
    assert 3 * weights.file_size(0) == whole.file_size(0)
    assert dict(weights.tensors()) == whole.shapes
    norm = "model.norm.weight"
    assert weights.stored(norm, Box((0,), (7,)))
    with pytest.raises(KeyError):
        weights.stored(state_name("exp_avg", norm), Box((0,), (7,)))


def test_names_of_states_are_taken_apart_again() -> None:
    names = list(saved_layout(tiny_model(), Layout(1)).tensors())
    assert len({name for name, _ in names}) == len(names) == 3 * 12
    for of, name in itertools.product(STATES, ("model.norm.weight", "model.layers.0.self_attn.q_proj.weight")):
        assert split_name(state_name(of, name)) == (of, name)
    assert state_name("exp_avg", "model.norm.weight") == "optimizer.exp_avg.model.norm.weight"


def test_what_is_not_stored_has_no_place() -> None:
    saved = saved_layout(tiny_model(tie_word_embeddings=True), Layout(1))
    for name in ("lm_head.weight", "model.layers.1.mlp.up_proj.weight", "optimizer.step.model.norm.weight", "w"):
        with pytest.raises(KeyError):
            saved.stored(name, Box((0,), (1,)))


def test_the_layout_goes_through_json() -> None:
    for saved in some_layouts(40):
        text = json.dumps(saved.to_json())
        read = SavedLayout.from_json(saved.model, json.loads(text))
        assert read.to_json() == saved.to_json()
        assert read.layers == saved.layers and read.layout == saved.layout
        assert all(read.held(rank) == saved.held(rank) for rank in range(saved.layout.world))


@pytest.mark.parametrize(
    "change",
    [
        {"dp": 0},
        {"dp": -1, "tp": -1},
        {"dp": None},
        {"dp": "two"},
        {"dp": 1.5},
        {"dp": True},
        {"tp": 3},  # does not cut the heads
        {"pp": 3},  # of four chunks
        {"zero": 0},
        {"zero": 4},
        {"zero": "3"},
        {"layers": []},
        {"layers": 5},
        {"layers": [2, 2]},
        {"layers": [2, 1, 1, 1, 1]},
        {"layers": [7, -2, 1, -1]},
        {"layers": [1, 1, 1, "2"]},
        {"states": []},
        {"states": "weights"},
        {"states": ["exp_avg"]},
        {"states": ["", "exp_avg_sq", "exp_avg"]},
        {"states": ["", "momentum"]},
        {"states": None},
        {"cp": ...},
        {"layers": ...},
    ],
    ids=str,
)
def test_a_layout_that_is_none_is_refused(change: dict[str, object]) -> None:
    saved = saved_for(Layout(1, tp=2, pp=2), zero=3, virtual=2)
    good = saved.to_json()
    assert SavedLayout.from_json(saved.model, good).to_json() == good
    bad = {key: value for key, value in (good | change).items() if value is not ...}
    with pytest.raises(ValueError, match="is no layout of"):
        SavedLayout.from_json(saved.model, bad)


@pytest.mark.parametrize("values", [None, [], 3, "dp", {}])
def test_what_is_no_object_is_refused(values: object) -> None:
    with pytest.raises(ValueError, match="is no layout of"):
        SavedLayout.from_json(tiny_model(), values)


def test_16384_ranks_of_405b_parameters_are_planned_by_each_for_itself() -> None:
    """What one rank does at a save and at a load under another layout, and the size of what the manifest says."""
    model = ModelConfig(
        vocab_size=128256, hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128,
        num_key_value_heads=8, max_position_embeddings=8192,
    )  # fmt: skip
    began_at = time.process_time()
    saver = SavedLayout(model, Layout(128, tp=8, pp=16), 1, tuple(split_layers(126, stages=16)))
    loader = SavedLayout(model, Layout(64, tp=16, pp=8, cp=2), 3, tuple(split_layers(126, stages=16)))
    assert saver.layout.world == loader.layout.world == 16384
    assert sum(prod(shape) for shape in saver.shapes.values()) > 405e9
    assert len(json.dumps(saver.to_json())) < 500
    for rank in (0, 9999, 16383):
        assert 0 < saver.file_size(rank) < 2 * 3 * 4 * 405e9 / 16384
        ranks, asked, found = set(), 0, 0
        for of, held in itertools.product(STATES, loader.held(rank)):
            for box in held.boxes:
                stored = saver.stored(state_name(of, held.name), box)
                ranks |= {one.rank for one in stored}
                asked, found = asked + 1, found + len(stored)
        assert 1 <= len(ranks) < 500, "a rank opens few of the files"
        assert found < 3 * asked, "and plans few reads"
    assert time.process_time() - began_at < 60
