"""Algorithm 1 on sampled data: how far from the best, against the bound of theorem 4.2, as the data grows."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rto_lightning.theory.pessimism import (
    LearnedReward,
    LearningSettings,
    learn_reward,
    pessimistic_reward_policy,
    pessimistic_value_policy,
    reward_bound,
    value_bound,
)
from rto_lightning.theory.preferences import Preferences, linear_rewards, sample_preferences
from rto_lightning.theory.soft_values import soft_value_iteration, suboptimality
from rto_lightning.theory.token_mdp import Layers, path_sums, sample_responses

Method = Literal["reward", "value", "none"]


class Task(NamedTuple):
    """A problem of learning from preferences."""

    features: Layers
    """Of state-action pairs, each ``(A**h, A, d)``."""
    theta: Tensor
    r"""The truth :math:`\theta^*`, shape ``(d,)``."""
    log_reference: Layers
    """Log-probabilities of the reference policy."""
    log_behaviour: Layers
    """Log-probabilities of the policy that wrote the responses of the data."""
    extra_pair: tuple[int, int] | None = None
    """A comparison that every data set holds once, beside those of the behaviour policy."""


class Measurement(NamedTuple):
    """What came of data sets of several sizes, each drawn several times."""

    suboptimality: Tensor
    """Equation 3.5, shape ``(sizes, seeds)``."""
    bounds: Tensor
    """Theorem 4.2 for method `reward`, theorem B.1 for `value`; nan for `none`. Shape ``(sizes, seeds)``."""


def measure(
    task: Task, sizes: Sequence[int], seeds: int, settings: LearningSettings, method: Method = "reward"
) -> Measurement:
    """Draw data sets, learn from each, and compare what was learned with the optimum.

    Args:
        task: The problem.
        sizes: Pairs in a data set.
        seeds: Data sets of each size.
        settings: Of Algorithm 1.
        method: ``"reward"`` is Algorithm 1, ``"value"`` its variant of appendix B, ``"none"`` the best policy for the
            estimated rewards.

    Returns:
        Suboptimality and bounds.
    """
    rewards = linear_rewards(task.features, task.theta)
    generator = torch.Generator().manual_seed(0)
    results = []
    for size in sizes:
        for _ in range(seeds):
            learned = learn_reward(task.features, draw_preferences(task, size, generator), settings)
            results.append(_learn_and_compare(task, rewards, learned, settings, method))
    return Measurement(*torch.tensor(results, dtype=torch.float64).view(len(sizes), seeds, 2).unbind(dim=2))


def measure_scales(
    task: Task, scales: Sequence[float], sizes: Sequence[int], seeds: int, settings: LearningSettings
) -> Tensor:
    """Suboptimality of Algorithm 1 for rewards of one shape and several sizes, from large differences to small ones.

    For one reward the suboptimality falls quickly once the data tells the best token from the second best. The rate of
    1 / sqrt(n) is that of the hardest reward of each number of pairs: the maximum over the scales.

    Args:
        task: The problem, whose theta is multiplied by each scale.
        scales: The multiples.
        sizes: Pairs in a data set.
        seeds: Data sets of each size and scale.
        settings: Of Algorithm 1.

    Returns:
        Averages over the seeds, shape ``(scales, sizes)``.
    """
    scaled = (task._replace(theta=scale * task.theta) for scale in scales)
    return torch.stack([measure(one, sizes, seeds, settings).suboptimality.mean(dim=1) for one in scaled])


def log_log_slope(sizes: Sequence[int], values: Tensor) -> float:
    """Slope of the least-squares line through ``log(values)`` against ``log(sizes)``.

    Args:
        sizes: At least two.
        values: Above 0, one for each size.

    Returns:
        The slope; -0.5 is a rate of 1 / sqrt(n).
    """
    x = torch.tensor(sizes, dtype=values.dtype).log()
    x = x - x.mean()
    return (x @ values.log() / x.square().sum()).item()


def draw_preferences(task: Task, size: int, generator: torch.Generator) -> Preferences:
    """Draw a data set.

    Args:
        task: The problem.
        size: Number of pairs.
        generator: Source of randomness.

    Returns:
        Labelled pairs of responses of the behaviour policy, and the extra pair.
    """
    own = size if task.extra_pair is None else size - 1
    first, second = (sample_responses(task.log_behaviour, own, generator) for _ in range(2))
    if task.extra_pair is not None:
        first, second = (
            torch.cat([responses, torch.tensor([extra])])
            for responses, extra in zip((first, second), task.extra_pair, strict=True)
        )
    sentence_rewards = path_sums(linear_rewards(task.features, task.theta))
    return sample_preferences(sentence_rewards, first, second, generator)


def _learn_and_compare(
    task: Task, rewards: Layers, learned: LearnedReward, settings: LearningSettings, method: Method
) -> tuple[float, float]:
    features, log_reference, beta = task.features, task.log_reference, settings.beta
    log_optimal = soft_value_iteration(rewards, log_reference, beta).log_policy
    bound = float("nan")
    if method == "value":
        log_policy = pessimistic_value_policy(features, log_reference, learned, beta, settings.bound)
        bound = value_bound(features, learned, log_optimal)
    elif method == "reward":
        log_policy = pessimistic_reward_policy(features, log_reference, learned, beta)
        bound = reward_bound(features, learned, log_optimal, log_policy, beta)
    else:
        log_policy = pessimistic_reward_policy(features, log_reference, learned, beta, pessimism=0)
    return suboptimality(log_policy, rewards, log_reference, beta), bound
