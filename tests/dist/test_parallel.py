"""What parallel means: layers and models cut over ranks equal the plain ones, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from workers import pool

from llama_dist.config import ModelConfig
from llama_dist.model.cuts import logical_shapes, slice_of
from llama_dist.model.init import init_
from llama_dist.model.llama import Cache, Documents, Llama, Places, rotary_tables
from llama_dist.parallel.collectives import (
    all_to_all,
    gather_sequence,
    reduce_from,
    scale_gradient,
    scatter_sequence,
    sum_gradient,
)
from llama_dist.parallel.context import UlyssesAttention, split_context_
from llama_dist.parallel.loss import gather_logits, token_losses
from llama_dist.parallel.tensor import TensorParallel, cut_
from llama_dist.pipeline.stage import checkpoint_

BATCH, LENGTH, VOCAB = 2, 24, 132
WITHIN = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 0.03}  # differences by rounding
# Boundaries at the edges of ranks' parts (6, 8, 12, 18) and beside them, documents of one token, and one document only.
DOCUMENTS: tuple[Documents, ...] = (((0, 1, 2, 6, 12, 13, 23), (0,)), ((0, 8, 11), (0, 5, 18)))


@dataclass(frozen=True)
class Case:
    """A layout and a model; rank = cp_rank * tp + tp_rank."""

    tp: int = 1
    cp: int = 1
    kv_heads: int = 2
    sequence_parallel: bool = False
    tied: bool = False
    documents: Documents | None = None
    recompute: str | int = "none"
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        words = [f"tp{self.tp}", f"cp{self.cp}", f"kv{self.kv_heads}", str(self.recompute)]
        words += ["sequence"] * self.sequence_parallel + ["tied"] * self.tied
        words += [f"documents{DOCUMENTS.index(self.documents)}"] if self.documents else []
        return "-".join(words)

    @property
    def world(self) -> int:
        return 2 if self.tp * self.cp == 2 else 4  # the pool; three ranks of four may be used

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(
            vocab_size=VOCAB,
            hidden_size=20,
            intermediate_size=36,
            num_hidden_layers=2,
            num_attention_heads=12,
            num_key_value_heads=self.kv_heads,
            head_dim=4,
            max_position_embeddings=LENGTH,
            initializer_range=0.1,
            tie_word_embeddings=self.tied,
        )


@dataclass(frozen=True)
class Place:
    """This worker's place in a case: the tensor-parallel context, and its part of the sequence."""

    tp: TensorParallel
    cp_group: dist.ProcessGroup
    cp_rank: int
    case: Case

    def chunk(self, x: Tensor) -> Tensor:
        """The positions of this context-parallel rank."""
        return x.chunk(self.case.cp, dim=1)[self.cp_rank]

    def share(self, x: Tensor) -> Tensor:
        """The positions of the residual stream that this rank has."""
        x = self.chunk(x)
        return x.chunk(self.tp.size, dim=1)[self.tp.rank] if self.tp.splits_sequence else x


def place_on_rank(case: Case) -> Place | None:
    """None on a rank of the pool that the case leaves out."""
    copies = max(case.tp // case.kv_heads, 1)
    rank = dist.get_rank()
    tp, kv, cp = groups_on_rank(case.tp, case.cp, copies)
    if rank >= case.tp * case.cp:
        return None
    tensor = TensorParallel(
        tp, rank=rank % case.tp, size=case.tp, sequence_parallel=case.sequence_parallel, kv_group=kv
    )
    return Place(tensor, cp, rank // case.tp, case)


@lru_cache
def groups_on_rank(tp: int, cp: int, copies: int) -> tuple[dist.ProcessGroup | None, ...]:
    rows = [list(range(c * tp, (c + 1) * tp)) for c in range(cp)]
    pieces = [row[i : i + copies] for row in rows for i in range(0, tp, copies)]
    columns = [list(range(t, tp * cp, tp)) for t in range(tp)]
    found: list[dist.ProcessGroup | None] = []
    for axis in (rows, pieces, columns):
        made = {tuple(ranks): dist.new_group(ranks) for ranks in axis}
        found.append(next((group for ranks, group in made.items() if dist.get_rank() in ranks), None))
    return tuple(found)


def plain_model(case: Case) -> Llama:
    model = Llama(case.config)
    init_(model, case.config, seed=3)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):  # all the same, they would hide which one was used
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model.to(case.dtype)


def cut_model(case: Case, place: Place, plain: Llama) -> Llama:
    with torch.device("meta"):
        model = Llama(case.config)
    cut_(model, place.tp)
    split_context_(model, place.cp_group, case.cp)
    checkpoint_(model, case.recompute)
    model.to(case.dtype).to_empty(device="cpu")
    whole = dict(plain.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(slice_for(case, place, name, whole[name]))
    return model


def slice_for(case: Case, place: Place, name: str, whole: Tensor) -> Tensor:
    held = slice_of(name, case.config, tp=case.tp, tp_rank=place.tp.rank)
    return whole[held.box.slices]


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_ids(seed: int) -> Tensor:
    return torch.randint(VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))


def assert_same(found: Tensor, expected: Tensor, name: str, *, within: float) -> None:
    """Relative to the whole tensor: single elements may be small by cancellation."""
    assert found.shape == expected.shape and found.dtype == expected.dtype, name
    error = ((found - expected).double().norm() / expected.double().norm()).item()
    assert error < within, f"{name}: relative difference {error:.2g}"


Run = Callable[[Llama, Tensor, Places, Tensor, TensorParallel | None], Tensor]


class Part:
    """A part of the model to compare: how it runs, on the plain model and on a cut one, and what goes in."""

    def __init__(self, run: Run, *, ids: bool) -> None:
        self.run = run
        self.takes_ids = ids


def attention(model: Llama, x: Tensor, places: Places, targets: Tensor, tp: TensorParallel | None) -> Tensor:
    layer = model.model.layers["0"]
    return layer.self_attn(layer.input_layernorm(x), places)


def mlp(model: Llama, x: Tensor, places: Places, targets: Tensor, tp: TensorParallel | None) -> Tensor:
    layer = model.model.layers["1"]
    return layer.mlp(layer.post_attention_layernorm(x))


def head(model: Llama, x: Tensor, places: Places, targets: Tensor, tp: TensorParallel | None) -> Tensor:
    return token_losses(model.lm_head(model.model.norm(x)), targets, tp)


def embedding(model: Llama, x: Tensor, places: Places, targets: Tensor, tp: TensorParallel | None) -> Tensor:
    return model.model.embed_tokens(x)


def hidden_slice(model: Llama, x: Tensor, places: Places, targets: Tensor, tp: TensorParallel | None) -> Tensor:
    """What a stage in the middle does: hidden states in, of a part of the sequence, and hidden states out."""
    model.first = model.last = False
    length = places.rotary[0].shape[0]
    return model(x, start=places.start, length=length, documents=places.documents)


def whole_model(model: Llama, x: Tensor, places: Places, targets: Tensor, tp: TensorParallel | None) -> Tensor:
    return token_losses(model(x, start=places.start, documents=places.documents), targets, tp)


PARTS = {
    "attention": Part(attention, ids=False),
    "mlp": Part(mlp, ids=False),
    "head": Part(head, ids=False),
    "embedding": Part(embedding, ids=True),
    "hidden_slice": Part(hidden_slice, ids=False),
    "whole_model": Part(whole_model, ids=True),
}


class Shapes(TorchDispatchMode):
    """Keeps the shape of every tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen.update(tuple(x.shape) for x in tree_leaves(out) if isinstance(x, Tensor))
        return out


def compare_on_rank(case: Case, part_name: str) -> dict[str, Tensor] | None:
    """Run a part both ways and compare; returns the gradients of what all tensor-parallel ranks hold whole.

    A case in float64 is so throughout: what the model does in float32 is wider too, and no rounding hides a mistake.
    """
    with patch.object(Tensor, "float", Tensor.double) if case.dtype == torch.float64 else nullcontext():
        return compare_within_precision(case, part_name, WITHIN[case.dtype])


def compare_within_precision(case: Case, part_name: str, within: float) -> dict[str, Tensor] | None:
    place, part = place_on_rank(case), PARTS[part_name]
    if place is None:
        return None
    plain = plain_model(case)
    model = cut_model(case, place, plain)
    x = random_ids(11) if part.takes_ids else random(BATCH, LENGTH, 20, seed=11, dtype=case.dtype)
    targets = random_ids(12)

    whole = x.clone().requires_grad_(not part.takes_ids)
    rotary = rotary_tables(case.config, start=0, length=LENGTH, device=x.device)
    expected = part.run(plain, whole, Places(rotary, documents=case.documents), targets, None)
    slope = random(*expected.shape, seed=13, dtype=expected.dtype)
    (expected * slope).sum().backward()

    own = (place.chunk(x) if part.takes_ids else place.share(x)).clone().requires_grad_(not part.takes_ids)
    start, length = place.cp_rank * LENGTH // case.cp, LENGTH // case.cp
    rotary = rotary_tables(case.config, start=start, length=length, device=x.device)
    places = Places(rotary, start, documents=case.documents)
    at_loss = expected.dim() == 2
    with Shapes() as shapes:
        found = part.run(model, own, places, place.chunk(targets), place.tp)
        (found * (place.chunk(slope) if at_loss else place.share(slope))).sum().backward()

    with torch.no_grad():
        assert_same(found, place.chunk(expected) if at_loss else place.share(expected), "output", within=within)
        if not part.takes_ids:
            assert_same(own.grad, place.share(whole.grad), "input's gradient", within=within)
        if case.tp > 1 and part_name != "embedding":
            assert not [shape for shape in shapes.seen if VOCAB in shape], "something has the whole vocabulary"
        return compare_gradients(case, place, model, plain, within=within)


def compare_gradients(case: Case, place: Place, model: Llama, plain: Llama, *, within: float) -> dict[str, Tensor]:
    expected = {name: p.grad for name, p in plain.named_parameters()}
    held = dict(model.named_parameters())
    assert held.keys() == expected.keys()
    assert any(gradient is not None for gradient in expected.values())
    for name, parameter in held.items():
        assert (parameter.grad is None) == (expected[name] is None), name
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad, group=place.cp_group)  # as ZeRO does: dp x cp ranks hold the same
            assert_same(parameter.grad, slice_for(case, place, name, expected[name]), name, within=within)
    return {name: p.grad for name, p in held.items() if p.dim() == 1 and p.grad is not None}


def assert_equal_on_all_ranks(case: Case, part: str) -> None:
    results = pool(case.world).run(compare_on_rank, case, part)
    kept = [result for result in results if result is not None]
    assert len(kept) == case.tp * case.cp
    for result in kept:  # to the bit: what ranks hold together must not drift apart
        assert result.keys() == kept[0].keys()
        assert all(torch.equal(result[name], kept[0][name]) for name in result)


LAYOUTS = [Case(tp=tp, cp=cp) for tp, cp in ((2, 1), (4, 1), (1, 2), (1, 4), (2, 2))]
SEQUENCE_PARALLEL = [replace(case, sequence_parallel=True) for case in LAYOUTS if case.tp > 1]
THREE = [Case(tp=3, kv_heads=kv, sequence_parallel=s) for kv in (1, 3) for s in (False, True)]
THREE.append(Case(cp=3, kv_heads=1))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("case", [*LAYOUTS, *SEQUENCE_PARALLEL, *THREE], ids=str)
def test_a_part_equals_the_plain_one(case: Case, part: str) -> None:
    assert_equal_on_all_ranks(case, part)


def whole_cases() -> Iterator[Case]:
    inputs = ((False, None), (True, None), (True, DOCUMENTS[0]), (False, DOCUMENTS[1]))
    for layout, kv_heads, (tied, documents) in product([*LAYOUTS, *SEQUENCE_PARALLEL], (4, 2, 1), inputs):
        yield replace(layout, kv_heads=kv_heads, tied=tied, documents=documents)
    for layout, kv_heads, recompute in product([*LAYOUTS, *SEQUENCE_PARALLEL], (4, 1), ("full", "selective", 2)):
        yield replace(layout, kv_heads=kv_heads, recompute=recompute, documents=DOCUMENTS[0])


@pytest.mark.parametrize("case", list(whole_cases()), ids=str)
def test_a_model_equals_the_plain_one_but_for_float64_rounding(case: Case) -> None:
    assert_equal_on_all_ranks(replace(case, dtype=torch.float64), "whole_model")


@pytest.mark.parametrize("case", [*LAYOUTS, *SEQUENCE_PARALLEL], ids=str)
def test_bfloat16_is_close(case: Case) -> None:
    assert_equal_on_all_ranks(replace(case, dtype=torch.bfloat16, documents=DOCUMENTS[1]), "whole_model")


# ---- generation


def generate_on_rank(case: Case) -> None:
    place = place_on_rank(case)
    plain = plain_model(case)
    model = cut_model(case, place, plain)
    place.tp.whole_sequence = True
    attend = model.model.layers["0"].self_attn.attend
    if isinstance(attend, UlyssesAttention):
        attend.whole_sequence = True
    ids, cache, start, logits = random_ids(1), Cache(LENGTH), 0, []
    with torch.inference_mode():
        for size in (5, 1, 1, LENGTH - 7):
            part = gather_logits(model(ids[:, start : start + size], start=start, cache=cache)[:, -1:], place.tp)
            logits.append(part)
            start += size
        expected = plain(ids)[:, [4, 5, 6, LENGTH - 1]]
        assert_same(torch.cat(logits, dim=1), expected, "logits", within=1e-6)


@pytest.mark.parametrize("case", [*LAYOUTS, *SEQUENCE_PARALLEL], ids=str)
def test_generation_feeds_pieces_of_any_length(case: Case) -> None:
    pool(case.world).run(generate_on_rank, case)


# ---- the loss


def losses_on_rank(size: int, dtype: torch.dtype, scale: float, hidden: bool) -> None:
    rank, part = dist.get_rank(), slice(dist.get_rank() * 5, dist.get_rank() * 5 + 5)
    tp = TensorParallel(groups_on_rank(size, 1, 1)[0], rank=rank, size=size)
    logits = (random(3, 7, 5 * size, seed=1) * scale).to(dtype)
    if hidden:  # one rank has no probability at all, and others have what decides
        logits[..., :5] = -torch.inf
        logits[0, 0, 5:-1] = -torch.inf
    first = 5 if hidden else 0
    targets = torch.randint(first, 5 * size, (3, 7), generator=torch.Generator().manual_seed(2))
    targets[0, 0] = 5 * size - 1
    whole, own = logits.clone().requires_grad_(), logits[..., part].clone().requires_grad_()
    found, expected = token_losses(own, targets, tp), token_losses(whole, targets)
    slope = random(3, 7, seed=3)
    (found * slope).sum().backward()
    (expected * slope).sum().backward()
    with torch.no_grad():
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)
        ulp = {torch.float32: 2e-6, torch.bfloat16: 2**-8}[dtype]
        torch.testing.assert_close(own.grad, whole.grad[..., part], rtol=ulp, atol=1e-6)
        torch.testing.assert_close(own.detach(), logits[..., part], rtol=0, atol=0)
        assert torch.equal(gather_logits(own, tp), logits)
    gathered = [torch.empty_like(found) for _ in range(size)]
    dist.all_gather(gathered, found.detach(), group=tp.group)
    assert all(torch.equal(other, found) for other in gathered)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "hidden"), [(1.0, False), (1.0, True), (1e4, False), (1e30, False), (0.0, False)])
def test_losses_of_a_cut_vocabulary_equal_cross_entropy(
    size: int, dtype: torch.dtype, scale: float, hidden: bool
) -> None:
    pool(size).run(losses_on_rank, size, dtype, scale, hidden)


def test_one_rank_is_plain_cross_entropy() -> None:
    logits, targets = random(2, 3, 8, seed=1), torch.tensor([[0, 3, 7], [1, 1, 2]])
    alone = TensorParallel(None, rank=0, size=1)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 3)
    assert torch.equal(token_losses(logits, targets, alone), expected)
    assert gather_logits(logits, alone) is logits


# ---- collectives


def adjoints_on_rank(size: int) -> None:
    """A linear map over all ranks and its backward must have the same inner products: <f(x), y> = <x, f'(y)>."""
    group, rank = groups_on_rank(size, 1, 1)[0], dist.get_rank()
    maps: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
        "gather_sequence": (lambda x: gather_sequence(x, group), (3, 2, 5)),
        "scatter_sequence": (lambda x: scatter_sequence(x, group), (3, 8, 5)),
        "one row": (lambda x: scatter_sequence(x, group), (1, 8, 5)),
        "heads to sequence": (lambda x: all_to_all(x, group, split=1, join=2), (3, 8, 2, 5)),
        "sequence to heads": (lambda x: all_to_all(x, group, split=2, join=1), (3, 2, 8, 5)),
    }
    for name, (f, shape) in maps.items():
        kept = random(*shape, seed=rank, dtype=torch.float64)
        x = kept.clone().requires_grad_()
        y = f(x)
        other = random(*y.shape, seed=10 + rank, dtype=torch.float64)
        given = other.clone()
        y.backward(given)
        assert torch.equal(x, kept) and torch.equal(given, other), f"{name} writes to its input"
        both = torch.stack(((y * other).sum(), (x * x.grad).sum())).detach()
        dist.all_reduce(both, group=group)
        assert abs(both[0] - both[1]) < 1e-9 * abs(both[0]), name


def values_on_rank(size: int) -> None:
    group, rank = groups_on_rank(size, 1, 1)[0], dist.get_rank()
    mine = torch.arange(2 * size * 3.0).view(1, 2 * size, 3) + rank
    total = sum(range(size)) + size * (mine - rank)
    x = mine.clone().requires_grad_()
    for name, f, forward, backward in (
        ("sum_gradient", lambda x: sum_gradient(x, group), mine, total),
        ("reduce_from", lambda x: reduce_from(x, group), total, mine),
        ("scale_gradient", lambda x: scale_gradient(x, 0.25), mine, mine / 4),
    ):
        y = f(x)
        assert torch.equal(y, forward), name
        (gradient,) = torch.autograd.grad(y, x, mine.clone())
        assert torch.equal(gradient, backward), name
    assert torch.equal(scatter_sequence(x, group), total.chunk(size, dim=1)[rank])
    assert torch.equal(gather_sequence(x, group), torch.cat([mine - rank + r for r in range(size)], dim=1))
    with pytest.raises(AssertionError, match=r"dimension 1 of \(1, 3, 2\) does not split"):
        scatter_sequence(torch.zeros(1, 3, 2), group)


@pytest.mark.parametrize("size", [2, 4])
def test_a_collective_and_its_backward_are_adjoint(size: int) -> None:
    pool(size).run(adjoints_on_rank, size)


@pytest.mark.parametrize("size", [2, 4])
def test_collectives_by_hand(size: int) -> None:
    pool(size).run(values_on_rank, size)


def uneven_on_rank() -> None:
    place = place_on_rank(Case(tp=4, sequence_parallel=True))
    model = cut_model(place.case, place, plain_model(place.case))
    model(random_ids(1)[:, :10])


def test_a_sequence_that_does_not_split_is_named() -> None:
    with pytest.raises(AssertionError, match=r"dimension 1 of \(2, 10, 20\) does not split over 4 ranks"):
        pool(4).run(uneven_on_rank)


# ---- cutting, without processes


@contextmanager
def meta_model(case: Case, rank: int) -> Iterator[tuple[Llama, TensorParallel]]:
    with torch.device("meta"):
        model = Llama(case.config)
    anyone: Any = object()  # stands in for a group that nothing is sent on
    yield model, TensorParallel(anyone, rank=rank, size=case.tp, kv_group=anyone)


@pytest.mark.parametrize(("tp", "kv_heads"), [(1, 4), (2, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("tied", [False, True])
def test_a_cut_model_has_the_names_and_the_slices(tp: int, kv_heads: int, tied: bool) -> None:
    case = Case(tp=tp, kv_heads=kv_heads, tied=tied)
    for rank in range(tp):
        with meta_model(case, rank) as (model, place):
            cut_(model, place)
        expected = {n: slice_of(n, case.config, tp=tp, tp_rank=rank).box.shape for n in logical_shapes(case.config)}
        assert {name: tuple(p.shape) for name, p in model.named_parameters()} == expected
        assert list(expected) == [name for name, _ in model.named_parameters()]
        assert all(parameter.is_meta for parameter in model.parameters())
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_one_rank_keeps_the_plain_modules() -> None:
    with torch.device("meta"):
        model = Llama(Case().config)
    before = list(model.modules())
    cut_(model, TensorParallel(None, rank=0, size=1, sequence_parallel=True))
    split_context_(model, None, 1)
    assert list(model.modules()) == before
    assert model.model.layers["0"].self_attn.attend is not None


def test_what_cannot_be_cut_is_refused() -> None:
    anyone: Any = object()
    with pytest.raises(AssertionError, match="lm_head.weight|embed_tokens.weight has memory already"):
        cut_(Llama(Case().config), TensorParallel(anyone, rank=0, size=2))
    with torch.device("meta"), pytest.raises(AssertionError, match="kv_group"):
        cut_(Llama(Case(kv_heads=1).config), TensorParallel(anyone, rank=0, size=2))
    with pytest.raises(AssertionError, match="without a group"):
        TensorParallel(None, rank=0, size=2)
    with pytest.raises(AssertionError, match="without a group"):
        UlyssesAttention(None, 2)
