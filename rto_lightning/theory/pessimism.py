"""Policies from preferences, pessimistic where data is thin: Algorithm 1 of arXiv 2404.18922, and appendix B."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rto_lightning.theory.convex import minimize
from rto_lightning.theory.preferences import Preferences, linear_rewards
from rto_lightning.theory.reward_learning import confidence_radius, covariance, maximum_likelihood, weighted_norm
from rto_lightning.theory.soft_values import expectation, expected_kl, soft_value_iteration, visitation
from rto_lightning.theory.token_mdp import Layers, path_sums


@dataclass(frozen=True)
class LearningSettings:
    """What Algorithm 1 is told beside the data."""

    beta: float = 0.05
    """Price of a nat of KL divergence from the reference policy."""
    bound: float = 0.5
    """Largest norm of theta, ``B``."""
    regularization: float = 1.0
    """Lambda of the covariance."""
    failure_probability: float = 0.1
    """Delta: how often the guarantee may fail."""


class LearnedReward(NamedTuple):
    """What the preferences say about theta."""

    theta: Tensor
    """The estimate, shape ``(d,)``."""
    precision: Tensor
    r"""Inverse covariance :math:`\Sigma_D^{-1}`, shape ``(d, d)``."""
    radius: float
    r""":math:`\varrho`: how far theta can be off, in the norm of the covariance."""


def learn_reward(features: Layers, preferences: Preferences, settings: LearningSettings) -> LearnedReward:
    """Estimate theta, and how far the estimate can be off (steps 2 and 3 of Algorithm 1).

    Args:
        features: Of state-action pairs, each ``(A**h, A, d)``.
        preferences: The data.
        settings: Bound, regularization and failure probability.

    Returns:
        The estimate and its confidence set.
    """
    sums = path_sums(features)
    differences = sums[preferences.chosen] - sums[preferences.rejected]
    radius = confidence_radius(
        dimension=sums.shape[1],
        largest_difference=differences.norm(dim=1).max().item(),
        bound=settings.bound,
        regularization=settings.regularization,
        failure_probability=settings.failure_probability,
    )
    precision = torch.linalg.inv(covariance(sums, preferences, settings.regularization))
    return LearnedReward(maximum_likelihood(sums, preferences, settings.bound), precision, radius)


def pessimistic_rewards(features: Layers, learned: LearnedReward, pessimism: float = 1.0) -> Layers:
    r"""Token rewards that are not too high with high probability (equation 4.2).

    .. math::
        \hat r(s, a) = \phi(s, a)^\top \hat\theta - \varrho \|\phi(s, a)\|_{\Sigma_D^{-1}}

    Args:
        features: Of state-action pairs.
        learned: From `learn_reward`.
        pessimism: Multiplies :math:`\varrho`; 1 is Algorithm 1, 0 believes the estimate.

    Returns:
        Token rewards.
    """
    penalty = pessimism * learned.radius
    return tuple(layer @ learned.theta - penalty * weighted_norm(layer, learned.precision) for layer in features)


def pessimistic_reward_policy(
    features: Layers, log_reference: Layers, learned: LearnedReward, beta: float, pessimism: float = 1.0
) -> Layers:
    """Algorithm 1: the best policy for the pessimistic rewards.

    Args:
        features: Of state-action pairs.
        log_reference: Log-probabilities of the reference policy.
        learned: From `learn_reward`.
        beta: Price of a nat of KL divergence.
        pessimism: 1 is Algorithm 1, 0 the best policy for the estimated rewards.

    Returns:
        Log-probabilities of the policy.
    """
    rewards = pessimistic_rewards(features, learned, pessimism)
    return soft_value_iteration(rewards, log_reference, beta).log_policy


def pessimistic_value_policy(
    features: Layers, log_reference: Layers, learned: LearnedReward, beta: float, bound: float
) -> Layers:
    r"""The variant that is pessimistic about a policy's value instead of each token's reward (equation B.1).

    .. math::
        \hat\pi = \arg\max_\pi \min_{\theta \in \Theta} E_{d^\pi}[\phi]^\top \theta
            - \beta\, E_{d^\pi} KL(\pi \| \pi_{ref}), \qquad
        \Theta = \{\|\theta\| \le B,\; \|\theta - \hat\theta\|_{\Sigma_D} \le \varrho\}

    What is maximized is concave in the visits and linear in theta, so the order of max and min does not matter, and
    the policy is the optimal one for the theta whose optimal value is lowest; that value is convex in theta.

    Args:
        features: Of state-action pairs.
        log_reference: Log-probabilities of the reference policy.
        learned: From `learn_reward`.
        beta: Price of a nat of KL divergence, above 0.
        bound: :math:`B`.

    Returns:
        Log-probabilities of the policy.
    """
    sigma: Tensor = torch.linalg.inv(learned.precision)

    def optimal_value(theta: Tensor) -> Tensor:
        return soft_value_iteration(linear_rewards(features, theta), log_reference, beta).start

    def outside_ball(theta: Tensor) -> Tensor:
        return theta.square().sum() / bound**2 - 1

    def outside_confidence(theta: Tensor) -> Tensor:
        error = theta - learned.theta
        return (error @ sigma @ error) / learned.radius**2 - 1

    worst = minimize(optimal_value, learned.theta, [outside_ball, outside_confidence])
    return soft_value_iteration(linear_rewards(features, worst), log_reference, beta).log_policy


def reward_bound(
    features: Layers, learned: LearnedReward, log_optimal: Layers, log_policy: Layers, beta: float
) -> float:
    r"""What Algorithm 1 can be worse than the best, at most, with high probability (theorem 4.2).

    .. math::
        2 \varrho\, E_{d^*} \|\phi(s, a)\|_{\Sigma_D^{-1}} - \beta\, E_{d^*} KL(\pi^*(s) \| \hat\pi(s))

    Args:
        features: Of state-action pairs.
        learned: From `learn_reward`.
        log_optimal: Log-probabilities of the optimal policy :math:`\pi^*` for the true rewards.
        log_policy: Log-probabilities of what Algorithm 1 returned, :math:`\hat\pi`.
        beta: Price of a nat of KL divergence.

    Returns:
        The bound.
    """
    norms = tuple(weighted_norm(layer, learned.precision) for layer in features)
    covered = expectation(visitation(log_optimal), norms)
    return (2 * learned.radius * covered - beta * expected_kl(log_optimal, log_policy)).item()


def value_bound(features: Layers, learned: LearnedReward, log_optimal: Layers) -> float:
    r"""The same for the variant (theorem B.1), :math:`2 \varrho\, \|E_{d^*}[\phi(s, a)]\|_{\Sigma_D^{-1}}`.

    Args:
        features: Of state-action pairs.
        learned: From `learn_reward`.
        log_optimal: Log-probabilities of the optimal policy for the true rewards.

    Returns:
        The bound.
    """
    mean = expectation(visitation(log_optimal), features)
    return 2 * learned.radius * weighted_norm(mean, learned.precision).item()
