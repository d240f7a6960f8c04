import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rto_lightning.theory import (
    Preferences,
    confidence_radius,
    covariance,
    maximum_likelihood,
    path_sums,
    weighted_norm,
)
from rto_lightning.theory.reward_learning import project_to_ball
from tests.theory.problems import linear_problem


def gradient(sums: Tensor, preferences: Preferences, theta: Tensor) -> Tensor:
    """Of the mean negative log-likelihood, by hand."""
    differences = sums[preferences.chosen] - sums[preferences.rejected]
    return -(torch.sigmoid(-(differences @ theta))[:, None] * differences).mean(dim=0)


@given(st.integers(1, 4), st.integers(5, 300), st.sampled_from([0.1, 0.5, 3.0]), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_estimate_is_the_constrained_optimum(dimension: int, pairs: int, bound: float, seed: int) -> None:
    """A point of a ball minimizes a convex function on it exactly if a projected gradient step does not move it."""
    features, _, preferences = linear_problem(dimension, pairs, seed)
    sums = path_sums(features)
    theta = maximum_likelihood(sums, preferences, bound)
    assert theta.norm().item() <= bound * (1 + 1e-15 * dimension)
    moved = project_to_ball(theta - gradient(sums, preferences, theta), bound)
    torch.testing.assert_close(moved, theta, rtol=0, atol=1e-6)


def test_estimate_is_the_best_of_a_fine_grid() -> None:
    """The radial projection of the unconstrained optimum is another point, and a worse one."""
    sums, bound = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64), 0.3
    # 60 of 100 prefer response 1 to 0, 9 of 10 prefer 2 to 0.
    wins = torch.tensor([1] * 60 + [0] * 40 + [2] * 9 + [0])
    losses = torch.tensor([0] * 60 + [1] * 40 + [0] * 9 + [2])
    preferences = Preferences(wins, losses)

    def likelihood(theta: Tensor) -> Tensor:
        return torch.nn.functional.logsigmoid(theta @ (sums[wins] - sums[losses]).T).sum(dim=-1)

    free = maximum_likelihood(sums, preferences, bound=100.0)
    torch.testing.assert_close(free, torch.tensor([1.5, 9.0], dtype=torch.float64).log(), rtol=0, atol=1e-6)
    angles = torch.linspace(0, 2 * math.pi, 20_001, dtype=torch.float64)
    circle = bound * torch.stack([angles.cos(), angles.sin()], dim=1)
    theta = maximum_likelihood(sums, preferences, bound)
    assert likelihood(theta).item() == pytest.approx(likelihood(circle).max().item(), abs=1e-6)
    assert likelihood(project_to_ball(free, bound)).item() < likelihood(theta).item() - 0.5


def test_separable_preferences_lead_to_the_boundary() -> None:
    sums = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    theta = maximum_likelihood(sums, Preferences(torch.tensor([1]), torch.tensor([0])), bound=2.0)
    torch.testing.assert_close(theta, torch.tensor([2.0, 0.0], dtype=torch.float64), rtol=0, atol=1e-8)


def test_a_direction_without_data_stays_at_0() -> None:
    features, _, preferences = linear_problem(3, 50, seed=0)
    sums = path_sums(features)
    sums[:, 2] = 1.0
    theta = maximum_likelihood(sums, preferences, bound=2.0)
    assert abs(theta[2].item()) < 1e-12
    assert theta[:2].norm().item() > 0.01


def test_covariance_is_the_sum_of_outer_products() -> None:
    features, _, preferences = linear_problem(3, 20, seed=1)
    sums = path_sums(features)
    expected = 0.7 * torch.eye(3, dtype=torch.float64)
    for chosen, rejected in zip(preferences.chosen, preferences.rejected, strict=True):
        expected += torch.outer(sums[chosen] - sums[rejected], sums[chosen] - sums[rejected])
    torch.testing.assert_close(covariance(sums, preferences, 0.7), expected)


def test_weighted_norm() -> None:
    x = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.1], [0.0, 0.1, 3.0]], dtype=torch.float64)
    torch.testing.assert_close(weighted_norm(x, weight), torch.einsum("bsi,ij,bsj->bs", x, weight, x).sqrt())


@pytest.mark.parametrize("pairs", [30, 1000])
def test_the_truth_is_within_the_radius(pairs: int) -> None:
    """Lemma A.1: it may be outside of the radius in one data set of ten."""
    bound, regularization, outside = 0.5, 1.0, 0
    for seed in range(20):
        features, theta, preferences = linear_problem(3, pairs, seed, norm=0.45)
        sums = path_sums(features)
        sigma = covariance(sums, preferences, regularization)
        largest = (sums[preferences.chosen] - sums[preferences.rejected]).norm(dim=1).max().item()
        radius = confidence_radius(3, largest, bound, regularization, failure_probability=0.1)
        error = maximum_likelihood(sums, preferences, bound) - theta
        outside += weighted_norm(error, sigma).item() > radius
    assert outside <= 2


def test_radius_of_a_single_coin() -> None:
    """One feature that differs by 1 in every pair: the formula with its numbers."""
    t = math.log(10)
    curvature = 1 / (1 + math.exp(0.5)) / (1 + math.exp(-0.5))
    expected = math.sqrt(1 + 2 * math.sqrt(t) + 2 * t) / (2 * curvature) + 2 * 0.5 * math.sqrt(0.25)
    assert confidence_radius(1, 1.0, 0.5, 0.25, 0.1) == pytest.approx(expected)
