import pytest
import torch
from torch import Tensor

from rto_lightning.theory import (
    Layers,
    LearnedReward,
    LearningSettings,
    TokenMDP,
    expectation,
    expected_kl,
    learn_reward,
    linear_rewards,
    pessimistic_reward_policy,
    pessimistic_rewards,
    pessimistic_value_policy,
    random_layers,
    reward_bound,
    soft_value_iteration,
    token_features,
    uniform_log_policy,
    value_bound,
    visitation,
    weighted_norm,
)
from rto_lightning.theory.convex import minimize
from rto_lightning.theory.token_mdp import log_softmax
from tests.theory.problems import linear_problem

SETTINGS = LearningSettings(beta=0.3)
REFERENCE = log_softmax(random_layers(TokenMDP(3, 3), torch.Generator().manual_seed(5)))


def pessimistic_value(log_policy: Layers, features: Layers, learned: LearnedReward) -> float:
    """The lowest value that the policy has for a theta of the confidence set, by minimizing over it."""
    visits = expectation(visitation(log_policy), features)
    sigma = torch.linalg.inv(learned.precision)

    def outside_confidence(theta: Tensor) -> Tensor:
        return (theta - learned.theta) @ sigma @ (theta - learned.theta) / learned.radius**2 - 1

    def outside_ball(theta: Tensor) -> Tensor:
        return theta.square().sum() / SETTINGS.bound**2 - 1

    worst = minimize(lambda theta: visits @ theta, learned.theta, [outside_ball, outside_confidence])
    return (visits @ worst - SETTINGS.beta * expected_kl(log_policy, REFERENCE)).item()


@pytest.mark.parametrize("pairs", [30, 3000])
def test_pessimistic_rewards_are_not_above_the_truth(pairs: int) -> None:
    """Equation A.5, for data sets in which the truth is within the radius."""
    for seed in range(5):
        features, theta, preferences = linear_problem(3, pairs, seed)
        learned = learn_reward(features, preferences, SETTINGS)
        assert weighted_norm(learned.theta - theta, torch.linalg.inv(learned.precision)).item() <= learned.radius
        truth = linear_rewards(features, theta)
        for low, true in zip(pessimistic_rewards(features, learned), truth, strict=True):
            assert bool((low <= true).all())


def test_equation_4_2() -> None:
    features, _, preferences = linear_problem(3, 100, seed=0)
    learned = learn_reward(features, preferences, SETTINGS)
    for layer, rewards in zip(features, pessimistic_rewards(features, learned), strict=True):
        norms = torch.einsum("sai,ij,saj->sa", layer, learned.precision, layer).sqrt()
        torch.testing.assert_close(rewards, layer @ learned.theta - learned.radius * norms)


def test_without_pessimism_the_estimate_is_believed() -> None:
    features, _, preferences = linear_problem(3, 100, seed=0)
    learned = learn_reward(features, preferences, SETTINGS)
    policy = pessimistic_reward_policy(features, REFERENCE, learned, SETTINGS.beta, pessimism=0)
    expected = soft_value_iteration(linear_rewards(features, learned.theta), REFERENCE, SETTINGS.beta).log_policy
    for layer, other in zip(policy, expected, strict=True):
        torch.testing.assert_close(layer, other)


@pytest.mark.parametrize("pairs", [100, 3000, 100_000])
def test_the_variant_has_the_highest_pessimistic_value(pairs: int) -> None:
    """Equation B.1. With 100 pairs the ball limits the worst theta, with 100,000 the confidence set."""
    features, _, preferences = linear_problem(3, pairs, seed=1)
    learned = learn_reward(features, preferences, SETTINGS)
    policy = pessimistic_value_policy(features, REFERENCE, learned, SETTINGS.beta, SETTINGS.bound)
    value = pessimistic_value(policy, features, learned)
    best_theta = soft_value_iteration(linear_rewards(features, learned.theta), REFERENCE, SETTINGS.beta)
    rivals = [
        REFERENCE,
        best_theta.log_policy,
        pessimistic_reward_policy(features, REFERENCE, learned, SETTINGS.beta),
        *(log_softmax(random_layers(TokenMDP(3, 3), torch.Generator().manual_seed(seed))) for seed in range(3)),
    ]
    for rival in rivals:
        assert pessimistic_value(rival, features, learned) <= value + 1e-6
    nudged = log_softmax(
        tuple(
            layer + 0.1 * noise
            for layer, noise in zip(policy, random_layers(TokenMDP(3, 3), torch.Generator()), strict=True)
        )
    )
    assert pessimistic_value(nudged, features, learned) < value


def test_bounds_by_hand() -> None:
    """One token decides: token 1 has the feature 1, token 0 none."""
    mdp = TokenMDP(2, 1)
    features, reference = token_features(mdp), uniform_log_policy(mdp)
    learned = LearnedReward(torch.tensor([0.2]).double(), torch.tensor([[0.25]]).double(), radius=3.0)
    optimal = soft_value_iteration(linear_rewards(features, torch.tensor([0.4]).double()), reference, 1.0).log_policy
    policy = pessimistic_reward_policy(features, reference, learned, beta=1.0)
    probability = torch.sigmoid(torch.tensor(0.4).double())
    low = torch.sigmoid(torch.tensor(0.2 - 3 * 0.5).double())
    divergence = probability * (probability / low).log() + (1 - probability) * ((1 - probability) / (1 - low)).log()
    first = 2 * 3 * probability * 0.5
    assert reward_bound(features, learned, optimal, policy, beta=1.0) == pytest.approx((first - divergence).item())
    assert value_bound(features, learned, optimal) == pytest.approx(first.item())
