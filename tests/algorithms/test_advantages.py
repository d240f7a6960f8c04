import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from rto_lightning.algorithms import generalized_advantages, return_to_go, whiten

from .strategies import Batch, batches

UNIT = st.floats(0, 1)


def test_two_tokens_by_hand() -> None:
    rewards = torch.tensor([[1.0, 2.0, torch.nan]], dtype=torch.float64)
    values = torch.tensor([[0.5, 1.0, torch.nan]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False]])
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=0.5, lam=0.5)
    # delta = [1 + 0.5 * 1 - 0.5, 2 - 1] = [1, 1]; A_0 = 1 + 0.25 * 1
    assert advantages.tolist() == [[1.25, 1.0, 0.0]]
    assert returns.tolist() == [[1.75, 2.0, 0.0]]


@given(batches(), UNIT, UNIT)
def test_equals_the_sum_over_temporal_differences(batch: Batch, gamma: float, lam: float) -> None:
    rewards, values = batch.normal(), batch.normal()
    advantages, returns = generalized_advantages(rewards, values, batch.mask, gamma, lam)
    for row, length in enumerate(batch.mask.sum(dim=1).tolist()):
        r, v = rewards[row].tolist(), [*values[row, :length].tolist(), 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length))
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(returns, advantages + batch.mask * values)


@given(batches())
def test_returns_are_reward_to_go_at_gamma_1_lambda_1(batch: Batch) -> None:
    rewards, values = batch.normal(), batch.normal()
    _, returns = generalized_advantages(rewards, values, batch.mask, 1.0, 1.0)
    reward_to_go = (rewards * batch.mask).flip(1).cumsum(dim=1).flip(1)
    torch.testing.assert_close(returns, reward_to_go * batch.mask)


@given(batches(), UNIT)
def test_exact_values_leave_no_advantage(batch: Batch, lam: float) -> None:
    rewards = batch.normal()
    _, exact = generalized_advantages(rewards, torch.zeros_like(rewards), batch.mask, 0.9, 1.0)
    advantages, returns = generalized_advantages(rewards, exact, batch.mask, 0.9, lam)
    torch.testing.assert_close(advantages, torch.zeros_like(rewards), rtol=0, atol=1e-12)
    torch.testing.assert_close(returns, exact)


@given(batches(), UNIT, UNIT)
def test_garbage_outside_the_mask_changes_nothing(batch: Batch, gamma: float, lam: float) -> None:
    rewards, values = batch.normal(), batch.normal()
    clean = generalized_advantages(rewards, values, batch.mask, gamma, lam)
    spoilt = generalized_advantages(batch.spoil(rewards), batch.spoil(values), batch.mask, gamma, lam)
    for a, b in zip(clean, spoilt, strict=True):
        assert torch.equal(a, b)
        assert not a[~batch.mask].any()


def test_left_padding_is_zero_too() -> None:
    mask = torch.tensor([[False, True, True]])
    advantages, returns = generalized_advantages(torch.ones(1, 3), torch.zeros(1, 3), mask, 1.0, 1.0)
    assert advantages.tolist() == returns.tolist() == [[0.0, 2.0, 1.0]]


# return_to_go


@given(batches(), UNIT)
def test_return_to_go_is_the_discounted_sum_from_each_token_on(batch: Batch, gamma: float) -> None:
    rewards = batch.normal()
    returns = return_to_go(batch.spoil(rewards), batch.mask, gamma)
    for row, length in enumerate(batch.mask.sum(dim=1).tolist()):
        for t in range(length):
            expected = sum(gamma ** (k - t) * rewards[row, k].item() for k in range(t, length))
            assert returns[row, t].item() == pytest.approx(expected, abs=1e-12)
    assert not returns[~batch.mask].any()


# whiten


@given(batches())
def test_whitened_values_have_mean_0_and_variance_1(batch: Batch) -> None:
    x = 5 + 3 * batch.normal()
    assume(x[batch.mask].var(correction=0) > 1e-4)
    whitened = whiten(x, batch.mask)
    tokens = whitened[batch.mask]
    assert tokens.mean().item() == pytest.approx(0, abs=1e-9)
    assert tokens.var(correction=0).item() == pytest.approx(1)
    assert not whitened[~batch.mask].any()


@given(batches(), st.floats(0.1, 10), st.floats(-10, 10))
def test_whitening_forgets_scale_and_shift(batch: Batch, scale: float, shift: float) -> None:
    x = batch.normal()
    assume(x[batch.mask].var(correction=0) > 1e-4)
    torch.testing.assert_close(whiten(scale * x + shift, batch.mask), whiten(x, batch.mask))


@given(batches())
def test_whitening_ignores_garbage_outside_the_mask(batch: Batch) -> None:
    x = batch.normal()
    assert torch.equal(whiten(batch.spoil(x), batch.mask), whiten(x, batch.mask))


def test_equal_values_whiten_to_zero() -> None:
    assert not whiten(torch.full((2, 3), 7.0), torch.ones(2, 3, dtype=torch.bool)).any()


def test_whitening_does_not_blow_up_below_the_variance_floor() -> None:
    x = torch.tensor([[1e-6, -1e-6]], dtype=torch.float64)
    torch.testing.assert_close(whiten(x, torch.tensor([[True, True]])), x * 1e4)
