"""Deferred gradients equal autograd's, and come when they are asked for; with DeepSpeed they are in tests/dist."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llama_dist.config import ModelConfig
from llama_dist.model.llama import Llama
from llama_dist.pipeline.deferred import WeightGradients, hand_over
from llama_dist.pipeline.stage import checkpoint_


def small_llama(*, tied: bool = False, **parts: Any) -> Llama:
    config = ModelConfig(
        vocab_size=13, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, max_position_embeddings=8, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(1)
    model = Llama(config, **parts)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def batch(number: int) -> Tensor:
    return torch.randint(0, 13, (2, 6), generator=torch.Generator().manual_seed(number))


def score(logits: Tensor) -> Tensor:
    return logits.float().sin().sum()


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_the_gradients_are_autograds(tied: bool, recompute: str) -> None:
    """Two micro-batches in flight, the weights' gradients of both after both."""
    plain, deferred = small_llama(tied=tied), small_llama(tied=tied)
    for number in (1, 2):
        score(plain(batch(number))).backward()
    checkpoint_(deferred, recompute)
    weights = WeightGradients()
    weights.defer_(deferred)
    outputs, kept = [deferred(batch(number)) for number in (1, 2)], []
    for output in outputs:
        with weights.noting() as terms:
            score(output).backward()
        kept.append(terms)
    assert not any(gradient is not None for gradient in gradients(deferred).values())
    for terms in kept:
        with hand_over(terms) as scalar:
            scalar.backward()
        assert not terms, "what the gradients were made of is kept"
    expected, got = gradients(plain), gradients(deferred)
    assert expected.keys() == got.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-6, atol=1e-6)


def test_the_input_gets_its_gradient_at_once() -> None:
    parts = {"layers": range(1, 2), "first": False, "last": False}
    plain, deferred = small_llama(**parts), small_llama(**parts)
    weights = WeightGradients()
    weights.defer_(deferred)
    inputs = [torch.linspace(-1, 1, 2 * 6 * 12).view(2, 6, 12).requires_grad_() for _ in range(2)]
    score(plain(inputs[0])).backward()
    with weights.noting() as terms:
        score(deferred(inputs[1])).backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-6, atol=1e-6)
    assert set(terms) == set(deferred.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_each_weights_hooks_run_once_and_only_when_handed_over(tied: bool) -> None:
    model = small_llama(tied=tied)
    weights = WeightGradients()
    weights.defer_(model)
    told: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: told.append(name))
    with weights.noting() as terms:
        score(model(batch(1))).backward()
    assert told == []
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = [names[parameter] for parameter in terms]
    with hand_over(terms) as scalar:
        scalar.backward()
    assert told == order and len(set(order)) == len(names)


def test_gradients_are_made_one_after_the_other() -> None:
    """The terms of a weight are freed before the next weight's gradient is computed."""
    model = small_llama()
    weights = WeightGradients()
    weights.defer_(model)
    with weights.noting() as terms:
        score(model(batch(1))).backward()
    left: list[int] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: left.append(len(terms)))
    with hand_over(terms) as scalar:
        scalar.backward()
    assert left == list(reversed(range(len(left))))


def test_names_and_values_of_weights_stay() -> None:
    model, plain = small_llama(tied=True), small_llama(tied=True)
    weights = WeightGradients()
    weights.defer_(model)
    with torch.no_grad():
        assert torch.equal(model(batch(3)), plain(batch(3)))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(isinstance(module.weight, nn.Parameter) for module in model.modules() if hasattr(module, "weight"))


def test_a_backward_outside_of_noting_is_told() -> None:
    model = small_llama()
    WeightGradients().defer_(model)
    with pytest.raises(AssertionError, match=r"must run inside of noting\(\)"):
        score(model(batch(1))).backward()


def test_weights_of_other_kinds_are_told() -> None:
    with pytest.raises(AssertionError, match="1: the weights of a LayerNorm cannot be deferred"):
        WeightGradients().defer_(nn.Sequential(nn.Tanh(), nn.LayerNorm(3)))
