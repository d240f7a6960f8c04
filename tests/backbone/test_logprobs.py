"""Chunked log-probabilities against the plain log-softmax."""

import pytest
import torch
from torch import nn

from rto_lightning.backbone.logprobs import gather_logprobs

N, H, V = 11, 6, 17


def _problem():
    torch.manual_seed(0)
    hidden = torch.randn(N, H, dtype=torch.float64, requires_grad=True)
    layer = nn.Linear(H, V, bias=False, dtype=torch.float64)
    return hidden, layer, torch.randint(V, (N,))


@pytest.mark.parametrize("chunk_tokens", [1, 4, 11, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_do_not_depend_on_the_chunk(chunk_tokens, temperature):
    hidden, layer, tokens = _problem()
    expected = (layer(hidden) / temperature).log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    expected_gradients = torch.autograd.grad(expected.square().sum(), [hidden, layer.weight])

    logprobs, entropy = gather_logprobs(hidden, layer, tokens, temperature, chunk_tokens)
    gradients = torch.autograd.grad(logprobs.square().sum(), [hidden, layer.weight])

    assert entropy is None
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-12)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk_tokens", [4, 100])
def test_entropy_is_that_of_the_distribution_and_has_its_gradient(chunk_tokens):
    hidden, layer, tokens = _problem()
    logits = layer(hidden) / 0.7
    expected = torch.distributions.Categorical(logits=logits).entropy()
    expected_logprobs = logits.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    weights = torch.linspace(-1, 1, N, dtype=torch.float64)
    expected_gradients = torch.autograd.grad(weights @ expected + expected_logprobs.sum(), [hidden, layer.weight])

    logprobs, entropy = gather_logprobs(hidden, layer, tokens, 0.7, chunk_tokens, with_entropy=True)
    gradients = torch.autograd.grad(weights @ entropy + logprobs.sum(), [hidden, layer.weight])

    torch.testing.assert_close(entropy, expected, rtol=0, atol=1e-12)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-12)


def test_logits_exist_for_one_chunk_at_a_time():
    hidden, layer, tokens = _problem()
    rows = []
    layer.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    gather_logprobs(hidden, layer, tokens, chunk_tokens=4)
    assert rows == [4, 4, 3]


def test_bfloat16_logits_are_normalised_in_float32():
    hidden, layer, tokens = _problem()
    logprobs, _ = gather_logprobs(hidden.bfloat16(), layer.bfloat16(), tokens)
    assert logprobs.dtype == torch.float32
