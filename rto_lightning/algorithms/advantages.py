"""Generalized advantage estimation, returns to go, and whitening."""

import torch
from torch import Tensor

from rto_lightning.algorithms.masks import masked_mean, zero_outside


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    r"""Advantages and returns by GAE (Schulman et al., arXiv 1506.02438, equation 16).

    .. math::
        \delta_t = r_t + \gamma V_{t+1} - V_t, \qquad
        A_t = \delta_t + \gamma \lambda A_{t+1}, \qquad
        R_t = A_t + V_t

    The value after the last token of a response is 0, truncated or not: the reward model has scored the
    answer as it stands, so there is no future to bootstrap.

    Args:
        rewards: Reward of each token, shape ``(B, T)``.
        values: Value of the state before each token, shape ``(B, T)``.
        mask: Boolean, one unbroken run of True a row; shape ``(B, T)``.
        gamma: Discount.
        lam: :math:`\lambda`; 0 is the one-step temporal difference, 1 the Monte Carlo estimate.

    Returns:
        Advantages (not whitened) and returns, each ``(B, T)`` and zero outside the mask.

    Example:
        >>> rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.2, 0.4, 0.8]])
        >>> mask = torch.ones(1, 3, dtype=torch.bool)
        >>> generalized_advantages(rewards, values, mask, gamma=1.0, lam=1.0)
        (tensor([[0.8000, 0.6000, 0.2000]]), tensor([[1., 1., 1.]]))
        >>> generalized_advantages(rewards, values, mask, gamma=1.0, lam=0.0)[0]
        tensor([[0.2000, 0.4000, 0.2000]])
    """
    rewards = zero_outside(rewards, mask)
    values = zero_outside(values, mask)
    advantages = torch.empty_like(rewards)
    next_advantage = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * lam * next_advantage
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    advantages = zero_outside(advantages, mask)
    return advantages, advantages + values


def return_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    r"""Discounted sum of the rewards from each token on: what GAE estimates without a critic.

    .. math::
        G_t = r_t + \gamma G_{t+1}

    Args:
        rewards: Reward of each token, shape ``(B, T)``.
        mask: Boolean, one unbroken run of True a row; shape ``(B, T)``.
        gamma: Discount.

    Returns:
        Shape ``(B, T)``, zero outside the mask.

    Example:
        >>> return_to_go(torch.tensor([[1.0, 2.0, 4.0]]), torch.ones(1, 3, dtype=torch.bool), gamma=0.5)
        tensor([[3., 4., 4.]])
    """
    return generalized_advantages(rewards, torch.zeros_like(rewards), mask, gamma, lam=1.0)[1]


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    r"""Shift and scale to mean 0 and variance 1 over all tokens of the mask.

    .. math::
        (x - \mu) / \sqrt{\max(\sigma^2, 10^{-8})}

    with the population variance :math:`\sigma^2` (divided by the number of tokens). The floor makes equal
    inputs 0.

    Args:
        x: Values, shape ``(B, T)``.
        mask: Boolean, shape ``(B, T)``.

    Returns:
        Shape ``(B, T)``, zero outside the mask.

    Example:
        >>> whiten(torch.tensor([[1.0, 3.0, 100.0]]), torch.tensor([[True, True, False]]))
        tensor([[-1.,  1.,  0.]])
    """
    centred = zero_outside(x - masked_mean(x, mask), mask)
    variance = masked_mean(centred.square(), mask)
    return centred * torch.rsqrt(variance.clamp(min=1e-8))
