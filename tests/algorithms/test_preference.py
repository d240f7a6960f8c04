import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rto_lightning.algorithms import dpo_loss, ipo_loss, rdpo_loss, simpo_loss

LOGPROBS = st.floats(-20, 0)
BETAS = st.floats(0.05, 1)
LENGTHS = st.integers(1, 200)


def pair(*numbers: float) -> list[Tensor]:
    """Policy chosen, policy rejected, reference chosen, reference rejected."""
    return [torch.tensor([x], dtype=torch.float64) for x in numbers]


PAIRS = st.tuples(LOGPROBS, LOGPROBS, LOGPROBS, LOGPROBS).map(lambda numbers: pair(*numbers))


@given(LOGPROBS, LOGPROBS, BETAS, st.floats(0, 0.49))
def test_policy_that_is_the_reference_has_dpo_loss_log_2(
    chosen: float, rejected: float, beta: float, label_smoothing: float
) -> None:
    result = dpo_loss(*pair(chosen, rejected, chosen, rejected), beta, label_smoothing)
    assert result.losses.item() == pytest.approx(math.log(2))
    assert result.chosen_rewards.item() == result.rejected_rewards.item() == 0


@given(PAIRS, BETAS)
def test_dpo_closed_form(numbers: list[Tensor], beta: float) -> None:
    result = dpo_loss(*numbers, beta)
    chosen, rejected = numbers[0] - numbers[2], numbers[1] - numbers[3]
    torch.testing.assert_close(result.losses, torch.log1p(torch.exp(-beta * (chosen - rejected))))
    torch.testing.assert_close(result.chosen_rewards, beta * chosen)
    torch.testing.assert_close(result.rejected_rewards, beta * rejected)


@given(PAIRS, BETAS)
def test_dpo_gradient_raises_the_chosen_and_lowers_the_rejected(numbers: list[Tensor], beta: float) -> None:
    numbers = [x.requires_grad_() for x in numbers]
    result = dpo_loss(*numbers, beta)
    result.losses.sum().backward()
    chosen, rejected = numbers[0].grad, numbers[1].grad
    assert chosen is not None
    assert rejected is not None
    assert chosen.item() < 0 < rejected.item()
    # beta * sigma(r_rejected - r_chosen): pairs that are wrong weigh most (DPO paper, section 4).
    weight = beta * torch.sigmoid(result.rejected_rewards - result.chosen_rewards)
    torch.testing.assert_close(-chosen, weight)
    torch.testing.assert_close(rejected, weight)
    assert not result.chosen_rewards.requires_grad
    assert not result.rejected_rewards.requires_grad


@given(PAIRS, BETAS, st.floats(0, 0.49))
def test_label_smoothing_mixes_both_labels(numbers: list[Tensor], beta: float, label_smoothing: float) -> None:
    right = dpo_loss(*numbers, beta).losses
    swapped = dpo_loss(numbers[1], numbers[0], numbers[3], numbers[2], beta).losses
    mixed = dpo_loss(*numbers, beta, label_smoothing).losses
    torch.testing.assert_close(mixed, (1 - label_smoothing) * right + label_smoothing * swapped)


def test_cdpo_stops_at_the_margin_of_its_noise() -> None:
    """With a tenth of the labels flipped the loss is least where sigma(margin) = 0.9."""
    margin = math.log(0.9 / 0.1)
    chosen, *others = pair(margin / 0.1, 0.0, 0.0, 0.0)
    chosen.requires_grad_()
    dpo_loss(chosen, *others, beta=0.1, label_smoothing=0.1).losses.sum().backward()
    assert chosen.grad is not None
    assert chosen.grad.item() == pytest.approx(0, abs=1e-12)


def test_dpo_is_finite_far_out() -> None:
    losses = dpo_loss(*(x.float() for x in pair(-5000.0, 0.0, 0.0, -5000.0)), beta=1.0, label_smoothing=0.1).losses
    assert losses.item() == pytest.approx(0.9 * 10_000)


@pytest.mark.parametrize("label_smoothing", [-0.1, 0.5, 1.0])
def test_label_smoothing_out_of_range(label_smoothing: float) -> None:
    with pytest.raises(ValueError, match="label_smoothing"):
        dpo_loss(*pair(0.0, 0.0, 0.0, 0.0), beta=0.1, label_smoothing=label_smoothing)


@given(LOGPROBS, LOGPROBS, LOGPROBS, BETAS)
def test_ipo_is_least_at_its_margin(
    rejected: float, reference_chosen: float, reference_rejected: float, beta: float
) -> None:
    goal = reference_chosen + rejected - reference_rejected + 1 / (2 * beta)
    for distance in (-1.0, 0.0, 2.0):
        chosen, *others = pair(goal + distance, rejected, reference_chosen, reference_rejected)
        chosen.requires_grad_()
        result = ipo_loss(chosen, *others, beta)
        result.losses.sum().backward()
        assert chosen.grad is not None
        assert result.losses.item() == pytest.approx(distance**2, abs=1e-9)
        assert chosen.grad.item() == pytest.approx(2 * distance, abs=1e-9)


@given(PAIRS, BETAS)
def test_rewards_do_not_depend_on_the_loss(numbers: list[Tensor], beta: float) -> None:
    dpo, ipo = dpo_loss(*numbers, beta), ipo_loss(*numbers, beta)
    assert torch.equal(dpo.chosen_rewards, ipo.chosen_rewards)
    assert torch.equal(dpo.rejected_rewards, ipo.rejected_rewards)


@given(PAIRS, LENGTHS, LENGTHS, BETAS, st.floats(0, 0.1))
def test_rdpo_is_dpo_with_a_reference_that_likes_each_token_less(
    numbers: list[Tensor], chosen_length: int, rejected_length: int, beta: float, alpha: float
) -> None:
    lengths = torch.tensor([chosen_length]), torch.tensor([rejected_length])
    result = rdpo_loss(*numbers, *lengths, beta, alpha)
    references = [x - alpha / beta * n for x, n in zip(numbers[2:], (chosen_length, rejected_length), strict=True)]
    expected = dpo_loss(*numbers[:2], *references, beta)
    for actual, wanted in zip(result, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@given(PAIRS, LENGTHS, BETAS, st.floats(0.001, 0.1))
def test_rdpo_learns_less_from_a_choice_that_length_explains(
    numbers: list[Tensor], length: int, beta: float, alpha: float
) -> None:
    """So the policy that has learned every pair is not the one that writes more."""
    policy_chosen = numbers[0].requires_grad_()
    steps = []
    for lengths in ((length + 50, length), (length, length), (length, length + 50)):
        result = rdpo_loss(*numbers, *map(torch.tensor, lengths), beta, alpha)
        [gradient] = torch.autograd.grad(result.losses.sum(), policy_chosen)
        steps.append(-gradient.item())
        assert not result.chosen_rewards.requires_grad and not result.rejected_rewards.requires_grad
    assert 0 < steps[0] < steps[1] < steps[2]
    # At equal lengths the term drops out.
    [gradient] = torch.autograd.grad(dpo_loss(*numbers, beta).losses.sum(), policy_chosen)
    assert steps[1] == pytest.approx(-gradient.item())


@given(LOGPROBS, st.floats(0.5, 10), st.floats(0, 3))
def test_simpo_loss_is_log_2_at_its_margin(rejected: float, beta: float, margin: float) -> None:
    chosen = torch.tensor([rejected + margin / beta], dtype=torch.float64)
    result = simpo_loss(chosen, torch.tensor([rejected], dtype=torch.float64), beta, margin)
    assert result.losses.item() == pytest.approx(math.log(2))
    assert (result.chosen_rewards - result.rejected_rewards).item() == pytest.approx(margin, abs=1e-9)


@given(LOGPROBS, LOGPROBS, st.floats(0.5, 10), st.floats(0, 3))
def test_simpo_closed_form_and_gradient(chosen: float, rejected: float, beta: float, margin: float) -> None:
    means = [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (chosen, rejected)]
    result = simpo_loss(*means, beta, margin)
    missing = torch.tensor([margin - beta * (chosen - rejected)], dtype=torch.float64)
    torch.testing.assert_close(result.losses.detach(), torch.log1p(missing.exp()))
    up, down = torch.autograd.grad(result.losses.sum(), means)
    torch.testing.assert_close(-up, beta * torch.sigmoid(missing))
    torch.testing.assert_close(down, -up)
    assert torch.equal(result.chosen_rewards, beta * means[0].detach())
    assert torch.equal(result.rejected_rewards, beta * means[1].detach())
