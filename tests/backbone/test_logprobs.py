"""Chunked log-probabilities against the plain log-softmax."""

import pytest
import torch
from torch import nn

from rto_lightning.backbone.logprobs import gather_logprobs

N, H, V = 11, 6, 17


def _problem(frozen=False):
    torch.manual_seed(0)
    hidden = torch.randn(N, H, dtype=torch.float64, requires_grad=True)
    layer = nn.Linear(H, V, bias=frozen, dtype=torch.float64).requires_grad_(not frozen)
    return hidden, layer, torch.randint(V, (N,))


def _trained(hidden, layer):
    return [hidden, *(weight for weight in layer.parameters() if weight.requires_grad)]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 11, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_do_not_depend_on_the_chunk(chunk_tokens, temperature, frozen):
    hidden, layer, tokens = _problem(frozen)
    expected = (layer(hidden) / temperature).log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    expected_gradients = torch.autograd.grad(expected.square().sum(), _trained(hidden, layer))

    logprobs, entropy = gather_logprobs(hidden, layer, tokens, temperature, chunk_tokens)
    gradients = torch.autograd.grad(logprobs.square().sum(), _trained(hidden, layer))

    assert entropy is None
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-12)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("chunk_tokens", [4, 100])
def test_entropy_is_that_of_the_distribution_and_has_its_gradient(chunk_tokens, frozen):
    hidden, layer, tokens = _problem(frozen)
    logits = layer(hidden) / 0.7
    expected = torch.distributions.Categorical(logits=logits).entropy()
    expected_logprobs = logits.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    weights = torch.linspace(-1, 1, N, dtype=torch.float64)
    expected_gradients = torch.autograd.grad(weights @ expected + expected_logprobs.sum(), _trained(hidden, layer))

    logprobs, entropy = gather_logprobs(hidden, layer, tokens, 0.7, chunk_tokens, with_entropy=True)
    gradients = torch.autograd.grad(weights @ entropy + logprobs.sum(), _trained(hidden, layer))

    torch.testing.assert_close(entropy, expected, rtol=0, atol=1e-12)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("frozen", [False, True])
def test_without_gradients_the_same(frozen):
    hidden, layer, tokens = _problem(frozen)
    expected = gather_logprobs(hidden, layer, tokens, 0.7, 4, with_entropy=True)
    with torch.no_grad():
        found = gather_logprobs(hidden, layer, tokens, 0.7, 4, with_entropy=True)
    for tensor, expected_tensor in zip(found, expected, strict=True):
        assert not tensor.requires_grad
        torch.testing.assert_close(tensor, expected_tensor.detach(), rtol=0, atol=1e-12)


def test_very_likely_tokens_and_very_large_logits():
    """exp(1000) overflows, and a probability that rounds to 0 has an infinite logarithm."""
    hidden = torch.tensor([[1000.0, 0.0], [0.0, 1000.0]], dtype=torch.float64, requires_grad=True)
    layer = nn.Linear(2, 2, bias=False, dtype=torch.float64).requires_grad_(False)
    layer.weight.copy_(torch.eye(2))
    logprobs, entropy = gather_logprobs(hidden, layer, torch.tensor([0, 0]), with_entropy=True)
    assert logprobs.tolist() == [0.0, -1000.0] and entropy.tolist() == [0.0, 0.0]
    assert torch.autograd.grad(logprobs.sum() + entropy.sum(), hidden)[0].tolist() == [[0.0, 0.0], [1.0, -1.0]]


@pytest.mark.parametrize(("frozen", "calls"), [(False, [4, 4, 3, 3, 4, 4]), (True, [4, 4, 3])])
def test_logits_exist_for_one_chunk_at_a_time(frozen, calls):
    """A layer that is trained computes them again in the backward pass, a frozen one does not."""
    hidden, layer, tokens = _problem(frozen)
    rows = []
    layer.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    gather_logprobs(hidden, layer, tokens, chunk_tokens=4)[0].sum().backward()
    assert rows == calls


def test_bfloat16_logits_are_normalised_in_float32():
    hidden, layer, tokens = _problem()
    logprobs, _ = gather_logprobs(hidden.bfloat16(), layer.bfloat16(), tokens)
    assert logprobs.dtype == torch.float32
