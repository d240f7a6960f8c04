import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rto_lightning.algorithms import clamp_magnitude, token_rewards

from .strategies import Batch, batches


def test_scale_comes_before_clip() -> None:
    dpo = torch.tensor([[0.5, 2.0, -3.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False]])
    rewards = token_rewards(dpo, torch.zeros_like(dpo), mask, beta_1=0.05, clip=0.05)
    # Clipping first would leave 0.05 * 0.05 = 0.0025 everywhere.
    torch.testing.assert_close(rewards, torch.tensor([[0.025, 0.05, -0.05, 0.0]], dtype=torch.float64))


@given(batches(), st.floats(0.01, 2), st.floats(0.01, 0.5))
def test_clip_bounds_and_leaves_small_rewards_alone(batch: Batch, beta_1: float, clip: float) -> None:
    dpo, reference = batch.logprobs(), batch.logprobs()
    exact = token_rewards(dpo, reference, batch.mask, beta_1, clip=0)
    torch.testing.assert_close(exact, batch.mask * beta_1 * (dpo - reference))
    clipped = token_rewards(dpo, reference, batch.mask, beta_1, clip)
    small = exact.abs() <= clip
    assert torch.equal(clipped[small], exact[small])
    assert torch.equal(clipped[~small], exact[~small].sign() * clip)


@given(batches())
def test_scale_zero_is_no_reward(batch: Batch) -> None:
    assert not token_rewards(batch.logprobs(), batch.logprobs(), batch.mask, beta_1=0.0, clip=0.05).any()


@given(batches(), st.sampled_from([0.0, 0.05]))
def test_exchanging_the_policies_changes_the_sign(batch: Batch, clip: float) -> None:
    dpo, reference = batch.logprobs(), batch.logprobs()
    there = token_rewards(dpo, reference, batch.mask, 0.05, clip)
    back = token_rewards(reference, dpo, batch.mask, 0.05, clip)
    assert torch.equal(there, -back)


@given(batches(), st.sampled_from([0.0, 0.05]))
def test_garbage_outside_the_mask_changes_nothing(batch: Batch, clip: float) -> None:
    dpo, reference = batch.logprobs(), batch.logprobs()
    clean = token_rewards(dpo, reference, batch.mask, 0.05, clip)
    assert torch.equal(token_rewards(batch.spoil(dpo), batch.spoil(reference), batch.mask, 0.05, clip), clean)
    assert not clean[~batch.mask].any()


def test_negative_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be negative"):
        clamp_magnitude(torch.zeros(2), -1.0)
