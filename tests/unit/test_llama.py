"""The model against Hugging Face's, and each promise of its slices, cache and number types."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama_dist.config import ModelConfig, RopeScaling
from llama_dist.model.hf import load_hf_model
from llama_dist.model.init import init_
from llama_dist.model.llama import Cache, Documents, Llama, RMSNorm, causal_attention, inverse_frequencies

SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
BASE = ModelConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=100,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    # Wider than in training, so that attention is far from uniform and errors in it show.
    initializer_range=0.2,
)
CONFIGS = {
    "grouped queries": BASE,
    "as many key heads as heads": BASE.model_copy(update={"num_key_value_heads": 6}),
    "one key head": BASE.model_copy(update={"num_key_value_heads": 1}),
    "tied head": BASE.model_copy(update={"tie_word_embeddings": True}),
    "llama 3 rope": BASE.model_copy(update={"rope_theta": 500000.0, "rope_scaling": SCALING}),
    "own head_dim": BASE.model_copy(update={"head_dim": 22, "rms_norm_eps": 1e-6, "rope_theta": 1000.0}),
}


def build(config: ModelConfig, **where: object) -> Llama:
    model = Llama(config, **where)
    init_(model, config, seed=3)
    return model


def build_hugging_face(config: ModelConfig) -> LlamaForCausalLM:
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= {"rope_type": "llama3", **config.rope_scaling.model_dump()}
    fields = config.model_dump(exclude={"rope_theta", "rope_scaling"})
    theirs = LlamaForCausalLM(LlamaConfig(**fields, rope_parameters=rope, attn_implementation="eager"))
    theirs.load_state_dict(build(config).state_dict())
    return theirs


def random_ids(config: ModelConfig, *shape: int) -> torch.Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(7))


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference over the largest value."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_equal_hugging_face(config: ModelConfig) -> None:
    ids = random_ids(config, 2, 600)
    with torch.no_grad():
        assert difference(build(config)(ids), build_hugging_face(config)(ids).logits) < 1e-5


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradients_equal_hugging_face(config: ModelConfig) -> None:
    ours, theirs, ids = build(config), build_hugging_face(config), random_ids(config, 2, 65)
    for logits in (ours(ids[:, :-1]), theirs(ids[:, :-1]).logits):
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = dict(theirs.named_parameters())
    found = dict(ours.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert difference(parameter.grad, expected[name].grad) < 1e-5, name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_real_checkpoint_equals_hugging_face(shared_data, attention: str) -> None:
    folder = shared_data / "checkpoints" / "stories260K" / "hf"
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    ours = load_hf_model(folder)
    ids = random_ids(ours.config, 2, 512)
    with torch.no_grad():
        found, expected = ours(ids), theirs(ids).logits
    assert expected.abs().max() > 10
    assert difference(found, expected) < 1e-5
    if attention == "sdpa":  # absolute: about one unit in the last place of the largest logits
        assert (found - expected).abs().max() < 1e-5


def test_slices_have_the_names_and_outputs_of_the_whole_model() -> None:
    ids = random_ids(BASE, 2, 20)
    whole = build(BASE)
    slices = [
        build(BASE, layers=range(0, 1), last=False),
        build(BASE, layers=range(1, 2), first=False, last=False),
        build(BASE, layers=range(2, 3), first=False),
    ]
    names = [name for part in slices for name, _ in part.named_parameters()]
    assert names == [name for name, _ in whole.named_parameters()]
    hidden = slices[0](ids)
    assert hidden.shape == (2, 20, BASE.hidden_size)
    assert torch.equal(slices[2](slices[1](hidden)), whole(ids))


def test_a_tied_last_slice_has_the_embedding_under_its_own_name() -> None:
    config = CONFIGS["tied head"]
    part = build(config, layers=range(2, 3), first=False)
    names = [name for name, _ in part.named_parameters()]
    assert names[0] == "model.embed_tokens.weight" and "lm_head.weight" not in names
    hidden = torch.randn(1, 4, config.hidden_size)
    part(hidden).sum().backward()
    assert part.model.embed_tokens.weight.grad.abs().max() > 0


@pytest.mark.parametrize("move", ["to_empty", "bfloat16", "double"])
def test_the_head_stays_tied(move: str) -> None:
    with torch.device("meta"):
        model = Llama(CONFIGS["tied head"])
    model = model.to_empty(device="cpu") if move == "to_empty" else getattr(model, move)()
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("pieces", [[1] * 12, [5, 7], [3, 1, 4, 1, 3]])
def test_the_cache_changes_nothing(pieces: list[int]) -> None:
    model, ids = build(BASE), random_ids(BASE, 2, 12)
    cache, start, logits = Cache(12), 0, []
    with torch.no_grad():
        for size in pieces:
            logits.append(model(ids[:, start : start + size], start=start, cache=cache))
            start += size
        assert difference(torch.cat(logits, dim=1), model(ids)) < 1e-5


def test_a_full_cache_says_so() -> None:
    model, cache = build(BASE), Cache(4)
    model(random_ids(BASE, 1, 4), cache=cache)
    with pytest.raises(AssertionError, match="position 5 does not fit a cache of 4"):
        model(random_ids(BASE, 1, 1), start=4, cache=cache)


def test_the_future_does_not_change_the_past() -> None:
    model, ids = build(BASE), random_ids(BASE, 1, 30)
    changed = ids.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % BASE.vocab_size
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20:], after[:, 20:])


DOCUMENTS: Documents = ((0,), (0, 1, 2, 7, 11), (0, 6))


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
def test_attention_within_documents_equals_a_block_diagonal_mask(kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = [(3, heads, 12, 8) for heads in (6, kv_heads, kv_heads)]
    ours = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    numbers = torch.zeros(3, 12, dtype=torch.int64)
    for row, begins in enumerate(DOCUMENTS):
        for begin in begins:
            numbers[row, begin:] += 1
    mask = (numbers[:, :, None] == numbers[:, None, :]).tril()[:, None]
    found = causal_attention(*ours, DOCUMENTS)
    expected = torch.nn.functional.scaled_dot_product_attention(*theirs, attn_mask=mask, enable_gqa=True)
    assert difference(found, expected) < 1e-14
    slope = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    for result in (found, expected):
        (result * slope).sum().backward()
    for own, other in zip(ours, theirs, strict=True):
        assert difference(own.grad, other.grad) < 1e-14


def test_a_document_in_company_is_as_alone() -> None:
    model, ids = build(BASE), random_ids(BASE, 3, 12)
    with torch.no_grad():
        logits = model(ids, documents=DOCUMENTS)
        for row, begins in enumerate(DOCUMENTS):
            for begin, end in zip(begins, (*begins[1:], 12), strict=True):
                alone = model(ids[row : row + 1, begin:end])  # rotary positions count only by their distance
                assert difference(logits[row : row + 1, begin:end], alone) < 1e-5
        assert difference(logits[1], model(ids)[1]) > 0.01


@pytest.mark.parametrize("documents", [((1,),) * 2, ((0, 5, 5),) * 2, ((0, 12),) * 2, ((0, 7, 3),) * 2, ((0,),)])
def test_impossible_documents_are_refused(documents: Documents) -> None:
    with pytest.raises(AssertionError, match="documents"):
        build(BASE)(random_ids(BASE, 2, 12), documents=documents)


def test_bf16_is_close_and_keeps_what_must_be_exact_in_float32() -> None:
    model, ids = build(BASE.model_copy(update={"initializer_range": 0.05})), random_ids(BASE, 1, 500)
    with torch.no_grad():
        exact = model(ids)
        rounded = model.bfloat16()(ids)
    assert rounded.dtype == torch.bfloat16
    # Position tables in bf16 could not tell position 257 from 256; the error would be of the order of 1.
    assert difference(rounded.float(), exact) < 0.03
    # Squares of these overflow float16 and lose digits in bfloat16.
    x = torch.full((1, 1000), 300.0, dtype=torch.float16)
    assert torch.equal(RMSNorm(1000, 1e-5).half()(x), torch.ones_like(x))


def test_it_builds_and_runs_on_meta_without_memory() -> None:
    huge = BASE.model_copy(update={"vocab_size": 10**6, "hidden_size": 2**14, "num_hidden_layers": 2})
    with torch.device("meta"):
        model = Llama(huge)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model(torch.zeros(1, 8, dtype=torch.int64, device="meta")).shape == (1, 8, 10**6)
    assert not list(model.buffers())


def test_constructing_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    Llama(BASE)
    assert torch.equal(torch.get_rng_state(), before)


def test_llama_3_scaling_divides_slow_rotations_and_keeps_fast_ones() -> None:
    plain = BASE.model_copy(update={"head_dim": 64, "rope_theta": 500000.0})
    scaled = plain.model_copy(update={"rope_scaling": SCALING})
    ratio = inverse_frequencies(plain) / inverse_frequencies(scaled)
    assert ratio[0] == 1 and ratio[-1] == SCALING.factor
    assert torch.all(ratio.diff() >= 0) and torch.any((ratio > 1) & (ratio < SCALING.factor))
