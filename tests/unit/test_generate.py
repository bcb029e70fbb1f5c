"""Generation: greedy equals Hugging Face token for token, sampling has exactly the probabilities it claims."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

import llama_dist.generate as generation
from llama_dist.config import ModelConfig
from llama_dist.errors import UserError
from llama_dist.generate import generate, token_probabilities
from llama_dist.model.hf import load_hf_model
from llama_dist.model.init import init_
from llama_dist.model.llama import Llama

PROMPTS = ["", "Once upon a time", "Tom and Lily went to the park. They saw a big dog and", "The cat"]
CONFIG = ModelConfig(
    vocab_size=8,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=40,
    initializer_range=0.5,
)


@pytest.fixture(scope="module")
def checkpoint(shared_data: Path) -> Path:
    return shared_data / "checkpoints" / "stories260K" / "hf"


@pytest.fixture(scope="module")
def stories(checkpoint: Path) -> Llama:
    return load_hf_model(checkpoint)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_file(str(checkpoint / "tokenizer.json"))


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    return [[1, *tokenizer.encode(text, add_special_tokens=False).ids] for text in PROMPTS]


@pytest.fixture(scope="module")
def tiny() -> Llama:
    model = Llama(CONFIG)
    init_(model, CONFIG, seed=1)
    return model


def test_greedy_equals_hugging_face(checkpoint: Path, stories: Llama, prompts: list[list[int]]) -> None:
    theirs = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for prompt in prompts:
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=150, do_sample=False)[0].tolist()
        assert generate(stories, [prompt], max_new_tokens=150, eos_id=2)[0] == expected[len(prompt) :]


def test_greedy_writes_the_story_known_for_this_checkpoint(stories: Llama, tokenizer: Tokenizer) -> None:
    # What llama2.c's own test expects of the same weights.
    story = tokenizer.decode(generate(stories, [[1]], max_new_tokens=200, eos_id=2)[0])
    assert story.startswith("Once upon a time, there was a little girl named Lily. She loved to play outside in the")
    assert story.endswith("Lily didn't want to help her mom, so she")


@pytest.mark.parametrize("prefill", [512, 3])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 2], [1, 3]])
def test_a_batch_equals_its_prompts_alone(
    monkeypatch: pytest.MonkeyPatch, stories: Llama, prompts: list[list[int]], order: list[int], prefill: int
) -> None:
    alone = [generate(stories, [prompts[i]], max_new_tokens=60, eos_id=2)[0] for i in order]
    monkeypatch.setattr(generation, "_PREFILL", prefill)
    assert generate(stories, [prompts[i] for i in order], max_new_tokens=60, eos_id=2) == alone
    assert len({len(prompts[i]) for i in range(4)}) > 2


def test_each_row_stops_at_its_own_eos(stories: Llama, prompts: list[list[int]]) -> None:
    free = generate(stories, prompts, max_new_tokens=40, eos_id=None)
    assert all(len(tokens) == 40 for tokens in free)
    eos = free[1][10]
    stopped = generate(stories, prompts, max_new_tokens=40, eos_id=eos)
    for tokens, whole in zip(stopped, free, strict=True):
        assert tokens == (whole[: whole.index(eos) + 1] if eos in whole else whole)
    assert len({len(tokens) for tokens in stopped}) > 1


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.6), (4, 0.8)])
def test_samples_have_the_exact_probabilities(tiny: Llama, top_k: int, top_p: float) -> None:
    # Of the 64 pairs of first and second token, worked out here from full forward passes.
    rule = {"temperature": 2.0, "top_k": top_k, "top_p": top_p}
    prompt, count = [1, 5, 2], 4000
    with torch.no_grad():
        first = by_hand(tiny(torch.tensor([prompt]))[0, -1], **rule)
        followed = torch.tensor([[*prompt, token] for token in range(8)])
        expected = torch.stack([p * by_hand(row[-1], **rule) for p, row in zip(first, tiny(followed), strict=True)])
    pairs = torch.tensor(generate(tiny, [prompt] * count, max_new_tokens=2, eos_id=None, seed=3, **rule))
    observed = torch.zeros(8, 8).index_put_((pairs[:, 0], pairs[:, 1]), torch.ones(count), accumulate=True)
    assert observed[expected == 0].sum() == 0
    # Cells with few expected draws are pooled, as the chi-square distribution needs about 5 in each.
    expected, observed = expected.flatten() * count, observed.flatten()
    common = expected >= 5
    expected, observed = (torch.cat((x[common], x[~common].sum()[None])) for x in (expected, observed))
    kept = expected > 0
    chi_square = ((observed - expected)[kept] ** 2 / expected[kept]).sum().item()
    freedom = int(kept.sum()) - 1
    assert freedom >= 5
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5


def by_hand(logits: torch.Tensor, *, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """The rule in plain Python: sort, keep top_k, keep the fewest that hold top_p, share out."""
    weights = torch.exp(logits.double() / temperature).tolist()
    ranked = sorted(range(len(weights)), key=lambda token: -weights[token])[: top_k or None]
    total, held, kept = sum(weights[token] for token in ranked), 0.0, []
    for token in ranked:
        kept.append(token)
        held += weights[token]
        if held >= top_p * total:
            break
    return torch.tensor([weights[t] / held if t in kept else 0.0 for t in range(len(weights))], dtype=torch.float64)


def test_cuts_of_a_distribution() -> None:
    logits = torch.tensor([0.5, 0.2, 0.2, 0.1]).log()
    found = {
        (2, 1.0): [5 / 7, 2 / 7, 0, 0],
        (0, 0.5): [1, 0, 0, 0],
        (0, 0.6): [5 / 7, 2 / 7, 0, 0],
        (0, 1.0): [0.5, 0.2, 0.2, 0.1],
        (9, 1e-9): [1, 0, 0, 0],
        (3, 0.8): [5 / 9, 2 / 9, 2 / 9, 0],
    }
    for (top_k, top_p), expected in found.items():
        assert token_probabilities(logits, temperature=1.0, top_k=top_k, top_p=top_p).tolist() == pytest.approx(
            expected, abs=1e-6
        ), (top_k, top_p)


def test_edges_of_a_cut() -> None:
    even = token_probabilities(torch.zeros(4), temperature=1.0, top_p=0.5)
    assert even.tolist() == [0.5, 0.5, 0, 0]  # exactly top_p is enough
    # The lowest and the highest draw fall on kept tokens, though the first and the last token are cut.
    logits, rule = torch.tensor([0.0, 1.0, 1.0, 0.0]), {"temperature": 1.0, "top_k": 2, "top_p": 1.0}
    assert generation._pick(logits, 0.0, **rule) == 1
    assert generation._pick(logits, 1 - 2**-53, **rule) == 2


def test_a_seed_repeats_and_other_prompts_change_nothing(tiny: Llama) -> None:
    def sample(prompts: list[list[int]], seed: int) -> list[list[int]]:
        return generate(tiny, prompts, max_new_tokens=20, eos_id=None, temperature=1.0, seed=seed)

    assert sample([[1], [1, 2]], 5) == sample([[1], [1, 2]], 5)
    assert sample([[1], [1, 2]], 5) != sample([[1], [1, 2]], 6)
    assert sample([[1], [1, 2]], 5)[1] == sample([[1, 3, 3, 4], [1, 2], [1]], 5)[1]
    same = sample([[1]] * 3, 5)
    assert same[0] != same[1] != same[2]


def test_a_low_temperature_is_greedy(tiny: Llama) -> None:
    rule: dict[str, Any] = {"max_new_tokens": 20, "eos_id": None}
    assert generate(tiny, [[1]], temperature=1e-4, **rule) == generate(tiny, [[1]], **rule)
    assert generate(tiny, [[1]], temperature=5.0, top_k=1, **rule) == generate(tiny, [[1]], **rule)


def test_the_last_position_can_be_filled(tiny: Llama) -> None:
    assert len(generate(tiny, [[1] * 10], max_new_tokens=30, eos_id=None)[0]) == 30
    assert generate(tiny, [], max_new_tokens=3, eos_id=None) == []


@pytest.mark.parametrize(
    ("prompt", "rule", "named"),
    [
        ([1] * 11, {"max_new_tokens": 30}, "11 tokens and 30 new ones"),
        ([], {}, "prompt 0 has no tokens"),
        ([1, 8], {}, "token 8; the model has 0 to 7"),
        ([-1], {}, "token -1"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([1], {"temperature": -1.0}, "temperature is -1.0"),
        ([1], {"temperature": float("nan")}, "temperature is nan"),
        ([1], {"top_p": 0.0}, "top_p is 0.0"),
        ([1], {"top_k": -1}, "top_k is -1"),
    ],
)
def test_wrong_requests_are_named(tiny: Llama, prompt: list[int], rule: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match="generate: ") as caught:
        generate(tiny, [prompt], **{"max_new_tokens": 5, "eos_id": None, **rule})
    assert named in str(caught.value)
