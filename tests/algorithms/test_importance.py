import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rto_lightning.algorithms import engine_mismatch, kl_estimate, policy_loss, truncated_importance_weights

from .strategies import Batch, batches


def test_the_ratio_up_to_the_cap() -> None:
    policy = torch.tensor([[0.5, 0.25, 0.9, 0.1]]).log()
    engine = torch.tensor([[0.25, 0.5, 0.1, 0.2]]).log()
    mask = torch.tensor([[True, True, True, False]])
    weights = truncated_importance_weights(policy, engine, mask, cap=3.0)
    torch.testing.assert_close(weights, torch.tensor([[2.0, 0.5, 3.0, 0.0]]))


def test_a_cap_below_1_is_a_cap() -> None:
    policy, engine = torch.tensor([[0.5, 0.1]]).log(), torch.tensor([[0.5, 0.4]]).log()
    weights = truncated_importance_weights(policy, engine, torch.tensor([[True, True]]), cap=0.75)
    torch.testing.assert_close(weights, torch.tensor([[0.75, 0.25]]))


@given(st.integers(0, 2**32 - 1))
def test_untruncated_they_turn_means_of_the_engine_into_means_of_the_policy(seed: int) -> None:
    """Averaged exactly over a vocabulary, with the engine's probabilities."""
    generator = torch.Generator().manual_seed(seed)
    policy, engine = torch.randn(2, 1, 8, dtype=torch.float64, generator=generator).log_softmax(dim=-1)
    quantity = torch.randn(1, 8, dtype=torch.float64, generator=generator)
    weights = truncated_importance_weights(policy, engine, torch.ones(1, 8, dtype=torch.bool), cap=math.inf)
    torch.testing.assert_close((engine.exp() * weights * quantity).sum(), (policy.exp() * quantity).sum())


@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_weighted_advantages_are_weighted_losses(aggregation: str, dual_clip: float | None) -> None:
    """Each token's clipped loss, and its gradient, is multiplied by the weight."""
    generator = torch.Generator().manual_seed(0)
    new, old, advantages = torch.randn(3, 6, 1, dtype=torch.float64, generator=generator)
    weights = torch.rand(6, 1, dtype=torch.float64, generator=generator) * 2
    mask = torch.ones(6, 1, dtype=torch.bool)
    for row in range(6):
        one = slice(row, row + 1)
        gradients, losses = [], []
        for factor, given_advantages in ((weights[one], advantages[one]), (1.0, weights[one] * advantages[one])):
            leaf = new[one].clone().requires_grad_()
            loss, _ = policy_loss(leaf, old[one], given_advantages, mask[one], 0.2, aggregation, dual_clip=dual_clip)
            loss = (loss * factor).sum()
            loss.backward()
            losses.append(loss.detach())
            gradients.append(leaf.grad)
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*gradients)


@given(batches())
def test_equal_engines_have_no_mismatch_and_weight_one(batch: Batch) -> None:
    logprobs = batch.spoil(batch.logprobs())
    mean, kl = engine_mismatch(logprobs, logprobs.clone(), batch.mask)
    assert mean == 0 and kl == 0
    weights = truncated_importance_weights(logprobs, logprobs.clone(), batch.mask, cap=2.0)
    assert torch.equal(weights, batch.mask.to(weights.dtype))


def test_mismatch_is_a_mean_over_tokens() -> None:
    policy, engine = torch.tensor([[-1.0, -2.0], [-3.0, 9.0]]), torch.tensor([[-1.5, -1.0], [-3.0, -9.0]])
    mask = torch.tensor([[True, True], [True, False]])
    mean, kl = engine_mismatch(policy, engine, mask)
    assert mean.item() == pytest.approx(0.5)
    assert kl.item() == pytest.approx(kl_estimate(engine, policy, mask, "k3").sum().item() / 3)
    assert kl > 0


def test_no_gradient_goes_through_the_weights() -> None:
    policy = torch.tensor([[-1.0]], requires_grad=True)
    weights = truncated_importance_weights(policy, torch.tensor([[-2.0]]), torch.tensor([[True]]), cap=5.0)
    assert not weights.requires_grad and weights.item() == pytest.approx(math.e)


def test_a_cap_of_zero_is_refused() -> None:
    ones = torch.ones(1, 1)
    with pytest.raises(ValueError, match="must be above 0"):
        truncated_importance_weights(ones, ones, ones.bool(), cap=0.0)
