"""Chunked divergence of two roles against the plain one of whole logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rto_lightning.algorithms import masked_sum, tdpo1_loss, tdpo2_loss
from rto_lightning.backbone import LoraSettings
from rto_lightning.backbone.divergence import gather_divergence
from tests.models import make_backbone, randomize, some_sequences, write_tiny_model

N, H, V = 12, 6, 17
LOSSES = {
    "tdpo1": lambda *answers: tdpo1_loss(*answers, beta=0.3),
    "tdpo2": lambda *answers: tdpo2_loss(*answers, beta=0.3, kl_coefficient=0.7),
}


def _problem():
    torch.manual_seed(0)
    hidden = [torch.randn(N, H, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    layers = [nn.Linear(H, V, bias=False, dtype=torch.float64) for _ in range(2)]
    return hidden, layers, torch.randint(V, (N,))


def _mixture(logprobs, reference_logprobs, kl):
    """A scalar to which every entry matters differently."""
    weights = torch.arange(1, kl.numel() + 1, dtype=kl.dtype).reshape(kl.shape)
    return (weights * (kl.square() + (logprobs - reference_logprobs).square())).sum()


@pytest.mark.parametrize("chunk_tokens", [1, 4, 5, 12, 100])
def test_values_and_gradients_do_not_depend_on_the_chunk(chunk_tokens):
    (hidden, reference_hidden), layers, tokens = _problem()
    logprobs, reference = layers[0](hidden).log_softmax(-1), layers[1](reference_hidden).log_softmax(-1).detach()
    expected = [x.gather(-1, tokens[:, None]).squeeze(-1) for x in (logprobs, reference)]
    expected.append(F.kl_div(logprobs, reference, log_target=True, reduction="none").sum(-1))
    expected_gradients = torch.autograd.grad(_mixture(*expected), [hidden, layers[0].weight])

    compared = gather_divergence(hidden, reference_hidden, *layers, tokens, chunk_tokens)
    _mixture(*compared).backward()
    for actual, wanted in zip(compared, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)
    for actual, wanted in zip((hidden.grad, layers[0].weight.grad), expected_gradients, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-9)
    assert reference_hidden.grad is None and layers[1].weight.grad is None


def test_logits_exist_for_one_chunk_of_each_role_at_a_time_and_again_in_the_backward():
    hidden, layers, tokens = _problem()
    rows = {"policy": [], "reference": []}
    for name, layer in zip(rows, layers, strict=True):
        layer.register_forward_hook(lambda module, inputs, output, name=name: rows[name].append(len(output)))
    compared = gather_divergence(*hidden, *layers, tokens, chunk_tokens=5)
    assert rows == {"policy": [5, 5, 2], "reference": [5, 5, 2]}
    compared.kl.sum().backward()
    assert {name: sorted(seen) for name, seen in rows.items()} == {name: [2, 2, 5, 5, 5, 5] for name in rows}


def test_roles_that_are_one_do_not_diverge():
    (hidden, _), (layer, _), tokens = _problem()
    compared = gather_divergence(hidden, hidden, layer, layer, tokens, chunk_tokens=5)
    assert torch.equal(compared.kl, torch.zeros(N, dtype=torch.float64))
    assert torch.equal(compared.logprobs, compared.reference_logprobs)
    [gradient] = torch.autograd.grad(compared.kl.sum(), hidden)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def test_probabilities_that_round_to_zero_are_no_nan():
    logits = torch.tensor([[500.0, 0.0, -500.0]], requires_grad=True)
    compared = gather_divergence(logits, -logits.detach(), nn.Identity(), nn.Identity(), torch.tensor([0]))
    compared.kl.sum().backward()
    assert compared.kl.item() == pytest.approx(1000)
    torch.testing.assert_close(logits.grad, torch.tensor([[1.0, 0.0, -1.0]]))


def test_bfloat16_logits_are_compared_in_float32():
    hidden, layers, tokens = _problem()
    compared = gather_divergence(*(x.bfloat16() for x in hidden), *(x.bfloat16() for x in layers), tokens)
    assert [x.dtype for x in compared] == [torch.float32] * 3


def _two_roles(model, **settings):
    backbone = make_backbone(model, **settings)
    backbone.add_role("reference")
    backbone.add_role("policy", trainable=True)
    randomize(backbone.trained_parameters("policy"))
    return backbone.train()


def _answers(logprobs, reference_logprobs, kl):
    """The six numbers that TDPO reads, for the first answer as chosen and the others as rejected."""
    sums = (logprobs.sum(1), reference_logprobs.sum(1), kl.sum(1))
    return [side for x in sums for side in (x[:1].expand(2), x[1:])]


def _from_whole_logits(backbone, sequences):
    """As `token_divergence`, by the models' own forward."""
    start, mask = sequences.prompt_width - 1, sequences.response_mask
    positions = (sequences.attention_mask.cumsum(-1) - 1).clamp(min=0)
    distributions = []
    for role in ("policy", "reference"):
        with backbone.play(role) as model:
            inputs = {"attention_mask": sequences.attention_mask, "position_ids": positions, "use_cache": False}
            logits = model(input_ids=sequences.input_ids, **inputs).logits[:, start:-1]
        distributions.append(logits.log_softmax(-1))
    policy, reference = distributions[0], distributions[1].detach()
    chosen = [x.gather(-1, sequences.response_ids[..., None]).squeeze(-1) for x in (policy, reference)]
    kl = F.kl_div(policy, reference, log_target=True, reduction="none").sum(-1)
    return [torch.where(mask, x, 0) for x in (*chosen, kl)]


def _gradients(loss, backbone, role="policy"):
    """Gradients of a loss whose backward runs while `role` is active."""
    backbone.zero_grad()
    with backbone.play(role):
        loss.backward()
    return [parameter.grad.clone() for parameter in backbone.trained_parameters("policy")]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("chunk_tokens", [3, 4, 100])
@pytest.mark.parametrize("mode", ["adapters", "full"])
def test_tdpo_is_that_of_whole_logits(tiny_model, mode, chunk_tokens, checkpointing, loss):
    settings = {"logprob_chunk_tokens": chunk_tokens, "gradient_checkpointing": checkpointing}
    backbone = _two_roles(tiny_model, mode=mode, **settings)
    sequences = some_sequences()
    assert sequences.response_mask.sum() == 9
    expected = _from_whole_logits(backbone, sequences)
    expected_losses = LOSSES[loss](*_answers(*expected)).losses
    expected_gradients = _gradients(expected_losses.sum(), backbone)

    compared = backbone.token_divergence("policy", "reference", sequences)
    losses = LOSSES[loss](*_answers(*compared)).losses
    gradients = _gradients(losses.sum(), backbone)
    for actual, wanted in zip((*compared, losses), (*expected, expected_losses), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-9)
    assert (compared.kl[sequences.response_mask] > 1e-3).all()
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients)
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-9)
    if mode == "full":
        assert all(parameter.grad is None for parameter in backbone.models["base"].parameters())


def test_each_output_layer_computes_as_its_own_role_whoever_is_active_in_the_backward(tmp_path):
    """With an adapter on the output layer, the two roles' output layers differ, and the backward calls both."""
    model = write_tiny_model(tmp_path / "untied", tie_word_embeddings=False)
    lora = LoraSettings(rank=4, alpha=8, target_modules=["lm_head", "q_proj"])
    backbone = _two_roles(model, lora=lora, logprob_chunk_tokens=4)
    sequences = some_sequences()
    expected = _gradients(_mixture(*_from_whole_logits(backbone, sequences)), backbone)
    actual = _gradients(
        _mixture(*backbone.token_divergence("policy", "reference", sequences)), backbone, role="reference"
    )
    for gradient, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-9)


def test_padding_changes_nothing(tiny_model):
    backbone = _two_roles(tiny_model)
    sequences = some_sequences()
    together = backbone.token_divergence("policy", "reference", sequences)
    alone = backbone.token_divergence("policy", "reference", sequences.rows([1]))
    mask = sequences.response_mask
    for batch, row in zip(together, alone, strict=True):
        assert (batch[~mask] == 0).all()
        torch.testing.assert_close(masked_sum(batch, mask, dim=1)[1], row.sum(), rtol=0, atol=1e-9)
