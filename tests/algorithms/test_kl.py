import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rto_lightning.algorithms import adaptive_kl_coefficient, kl_estimate

from .strategies import Batch, batches

ESTIMATORS = ("k1", "k2", "k3")


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [("k1", math.log(2)), ("k2", math.log(2) ** 2 / 2), ("k3", 0.5 - 1 + math.log(2))],
)
def test_where_the_policy_is_twice_as_likely(estimator: str, expected: float) -> None:
    policy = torch.tensor([[math.log(0.5)]], dtype=torch.float64)
    reference = torch.tensor([[math.log(0.25)]], dtype=torch.float64)
    assert kl_estimate(policy, reference, torch.tensor([[True]]), estimator).item() == pytest.approx(expected)


@given(st.integers(0, 2**32 - 1))
def test_k1_and_k3_are_unbiased(seed: int) -> None:
    """Averaged exactly over a vocabulary, both are KL(policy || reference), and not the reverse."""
    generator = torch.Generator().manual_seed(seed)
    policy, reference = torch.randn(2, 1, 8, dtype=torch.float64, generator=generator).log_softmax(dim=-1)
    mask = torch.ones(1, 8, dtype=torch.bool)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=policy), torch.distributions.Categorical(logits=reference)
    )
    for estimator in ("k1", "k3"):
        average = (policy.exp() * kl_estimate(policy, reference, mask, estimator)).sum(dim=1)
        torch.testing.assert_close(average, kl)


@given(batches())
def test_relations_between_the_estimators(batch: Batch) -> None:
    policy, reference = batch.logprobs(), batch.logprobs()
    k1, k2, k3 = (kl_estimate(policy, reference, batch.mask, estimator) for estimator in ESTIMATORS)
    torch.testing.assert_close(k2, k1.square() / 2)
    torch.testing.assert_close(k3 - k1, torch.expm1(-k1))
    assert (k2 >= 0).all()
    assert (k3 >= 0).all()
    # e^-d = 1 - d + d^2/2 - ...: k3 exceeds k2 where the policy is the less likely one, and only there.
    apart = k1.abs() > 1e-3
    assert torch.equal((k3 > k2)[apart], (k1 < 0)[apart])
    assert torch.equal(k1, -kl_estimate(reference, policy, batch.mask, "k1"))


@given(st.floats(-3, -1), st.sampled_from([1e-3, 1e-4, -1e-4]))
def test_k3_keeps_its_digits_in_float32(logprob: float, difference: float) -> None:
    reference = torch.tensor([[logprob]])
    policy = reference + difference
    mask = torch.tensor([[True]])
    exact = kl_estimate(policy.double(), reference.double(), mask, "k3").float()
    torch.testing.assert_close(kl_estimate(policy, reference, mask, "k3"), exact, rtol=0.02, atol=0)


@given(batches(), st.sampled_from(ESTIMATORS))
def test_garbage_outside_the_mask_changes_nothing(batch: Batch, estimator: str) -> None:
    policy, reference = batch.logprobs(), batch.logprobs()
    clean = kl_estimate(policy, reference, batch.mask, estimator)
    spoilt = batch.spoil(policy).requires_grad_()
    estimate = kl_estimate(spoilt, batch.spoil(reference), batch.mask, estimator)
    assert torch.equal(estimate, clean)
    assert not clean[~batch.mask].any()
    estimate.sum().backward()
    assert spoilt.grad is not None
    assert spoilt.grad.isfinite().all()
    assert not spoilt.grad[~batch.mask].any()


@given(batches())
def test_the_penalty_of_the_paper_is_the_default(batch: Batch) -> None:
    policy, reference = batch.logprobs(), batch.logprobs()
    torch.testing.assert_close(kl_estimate(policy, reference, batch.mask), batch.mask * (policy - reference))


def test_unknown_estimator() -> None:
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(x, x, torch.tensor([[True]]), "k4")


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(6.0, 0.1), (6.6, 0.1 * 1.01), (60.0, 0.1 * 1.02), (0.0, 0.1 * 0.98), (-5.0, 0.1 * 0.98)],
    ids=["on-target", "10%-above", "far-above", "below", "negative-estimate"],
)
def test_adaptive_coefficient_by_hand(kl: float, expected: float) -> None:
    coefficient = adaptive_kl_coefficient(0.1, kl, target=6.0, horizon=10_000, samples=1_000)
    assert coefficient == pytest.approx(expected, rel=1e-12)


def test_adaptive_coefficient_holds_targets_of_less_than_a_nat() -> None:
    assert adaptive_kl_coefficient(0.1, 0.55, target=0.5, horizon=10, samples=1) == pytest.approx(0.101, rel=1e-12)


@given(st.floats(0, 100), st.floats(0, 100))
def test_adaptive_coefficient_grows_with_the_kl(a: float, b: float) -> None:
    low, high = sorted((a, b))
    coefficients = [adaptive_kl_coefficient(0.1, kl, 6.0, 100, 32) for kl in (low, high)]
    assert 0 < coefficients[0] <= coefficients[1]


def test_controller_that_could_turn_the_penalty_into_a_reward_is_refused() -> None:
    with pytest.raises(ValueError, match="horizon"):
        adaptive_kl_coefficient(0.1, 1.0, target=6.0, horizon=100, samples=500)
    with pytest.raises(ValueError, match="target"):
        adaptive_kl_coefficient(0.1, 1.0, target=0.0, horizon=100, samples=10)
