"""TDPO1 and TDPO2: where they are DPO, where they are each other, and which divergence carries gradient."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rto_lightning.algorithms import dpo_loss, tdpo1_loss, tdpo2_loss

BETAS = st.floats(0.05, 1)
COEFFICIENTS = st.floats(0.05, 2)


def numbers_of_a_pair(logprobs: tuple[float, ...], kls: tuple[float, ...]) -> list[Tensor]:
    """Policy chosen, policy rejected, reference chosen, reference rejected, KL chosen, KL rejected."""
    return [torch.tensor([x], dtype=torch.float64) for x in (*logprobs, *kls)]


PAIRS = st.builds(
    numbers_of_a_pair, st.tuples(*[st.floats(-20, 0)] * 4), st.tuples(st.floats(0.1, 10), st.floats(0.1, 10))
)


@given(PAIRS, BETAS, COEFFICIENTS)
def test_without_divergence_both_are_dpo(pair: list[Tensor], beta: float, alpha: float) -> None:
    pair[4:] = [torch.zeros(1, dtype=torch.float64)] * 2
    expected = dpo_loss(*pair[:4], beta)
    for result in (tdpo1_loss(*pair, beta), tdpo2_loss(*pair, beta, alpha)):
        for actual, wanted in zip(result, expected, strict=True):
            torch.testing.assert_close(actual, wanted)


@given(PAIRS, BETAS)
def test_tdpo1_is_a_bradley_terry_model_of_its_rewards(pair: list[Tensor], beta: float) -> None:
    result = tdpo1_loss(*pair, beta)
    probability = torch.sigmoid(result.chosen_rewards - result.rejected_rewards)
    torch.testing.assert_close(result.losses, -probability.log())
    torch.testing.assert_close(result.chosen_rewards, beta * (pair[0] - pair[2] + pair[4]))


@given(PAIRS, BETAS)
def test_tdpo2_with_coefficient_0_is_dpo_and_with_1_has_the_values_of_tdpo1(pair: list[Tensor], beta: float) -> None:
    torch.testing.assert_close(tdpo2_loss(*pair, beta, 0.0).losses, dpo_loss(*pair[:4], beta).losses)
    for actual, wanted in zip(tdpo2_loss(*pair, beta, 1.0), tdpo1_loss(*pair, beta), strict=True):
        torch.testing.assert_close(actual, wanted)


@given(PAIRS, BETAS, COEFFICIENTS)
def test_only_tdpo1_drives_the_divergence_of_the_chosen_answer(pair: list[Tensor], beta: float, alpha: float) -> None:
    pair = [x.requires_grad_() for x in pair]
    policy_chosen, kls = pair[0], pair[4:]
    first = torch.autograd.grad(tdpo1_loss(*pair, beta).losses.sum(), [policy_chosen, *kls])
    torch.testing.assert_close(first[1], first[0])  # up with its log-probability
    torch.testing.assert_close(first[2], -first[0])
    second = torch.autograd.grad(tdpo2_loss(*pair, beta, alpha).losses.sum(), [policy_chosen, *kls], allow_unused=True)
    assert second[0] is not None and second[0].item() < 0
    assert second[1] is None
    torch.testing.assert_close(second[2], -alpha * second[0])


@pytest.mark.parametrize("result", [lambda pair: tdpo1_loss(*pair, 0.1), lambda pair: tdpo2_loss(*pair, 0.1, 0.2)])
def test_rewards_carry_no_gradient(result) -> None:
    pair = [x.requires_grad_() for x in numbers_of_a_pair((-1.0, -2.0, -3.0, -4.0), (0.5, 0.6))]
    assert not result(pair).chosen_rewards.requires_grad
    assert not result(pair).rejected_rewards.requires_grad
