"""Exact values in the token MDP with a price on the KL divergence from a reference (arXiv 2404.18922, section 3.2).

As in the paper, a Q-value holds ``beta * log pi_ref`` of its token, so that the optimal policy is
``exp((Q - V) / beta)`` and the log-probability of the token is still to be paid for.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rto_lightning.theory.token_mdp import Layers, path_sums


class Values(NamedTuple):
    """Values of a policy, and the policy."""

    q_values: Layers
    r"""Of every state-action pair, :math:`Q_\beta(s, a)`."""
    values: Layers
    r"""Of every state, :math:`V_\beta(s)`; the first layer, of shape ``(1,)``, is the value of the empty response."""
    log_policy: Layers
    """Log-probabilities of the tokens."""

    @property
    def start(self) -> Tensor:
        r"""Value of the policy, :math:`V_\beta(\rho)`, a scalar."""
        return self.values[0][0]


def soft_value_iteration(rewards: Layers, log_reference: Layers, beta: float) -> Values:
    r"""Solve the regularized MDP, from the last token back to the first (equations 3.3 and 3.4).

    .. math::
        Q^*(s, a) = r(s, a) + \beta \log \pi_{ref}(a | s) + V^*(s'), \qquad
        V^*(s) = \beta \log \sum_a e^{Q^*(s, a) / \beta}, \qquad
        \pi^*(a | s) = e^{(Q^*(s, a) - V^*(s)) / \beta}

    It is differentiable in the rewards.

    Args:
        rewards: Token rewards.
        log_reference: Log-probabilities of the reference policy.
        beta: Price of a nat of KL divergence, above 0.

    Returns:
        The optimal values and the optimal policy.
    """
    q_values, values, log_policy = [], [], []
    next_values = torch.zeros_like(rewards[-1])
    for reward, reference in zip(reversed(rewards), reversed(log_reference), strict=True):
        q_layer = reward + beta * reference + next_values.view(reward.shape)
        scaled = q_layer / beta
        normalizer = scaled.logsumexp(dim=1)
        q_values.append(q_layer)
        values.append(next_values := beta * normalizer)
        log_policy.append(scaled - normalizer[:, None])
    return Values(tuple(reversed(q_values)), tuple(reversed(values)), tuple(reversed(log_policy)))


def evaluate_policy(log_policy: Layers, rewards: Layers, log_reference: Layers, beta: float) -> Values:
    r"""Exact values of any policy (equation 3.3).

    .. math::
        Q^\pi(s, a) = r(s, a) + \beta \log \pi_{ref}(a | s) + V^\pi(s'), \qquad
        V^\pi(s) = E_{a \sim \pi}[Q^\pi(s, a) - \beta \log \pi(a | s)]

    Args:
        log_policy: Log-probabilities of the policy.
        rewards: Token rewards.
        log_reference: Log-probabilities of the reference policy.
        beta: Price of a nat of KL divergence; 0 gives the plain expected reward.

    Returns:
        The values.
    """
    q_values, values = [], []
    next_values = torch.zeros_like(rewards[-1])
    for policy, reward, reference in zip(reversed(log_policy), reversed(rewards), reversed(log_reference), strict=True):
        q_layer = reward + beta * reference + next_values.view(reward.shape)
        q_values.append(q_layer)
        values.append(next_values := (policy.exp() * (q_layer - beta * policy)).sum(dim=1))
    return Values(tuple(reversed(q_values)), tuple(reversed(values)), log_policy)


def suboptimality(log_policy: Layers, rewards: Layers, log_reference: Layers, beta: float) -> float:
    r"""What a policy is worse than the best, :math:`V^*_\beta(\rho) - V^\pi_\beta(\rho)` (equation 3.5)."""
    best = soft_value_iteration(rewards, log_reference, beta).start
    return (best - evaluate_policy(log_policy, rewards, log_reference, beta).start).item()


def visitation(log_policy: Layers) -> Layers:
    r"""Probability of reaching each state and taking each token there, :math:`d^\pi(s, a)` (equation A.1).

    Every layer sums to 1, so that expectations under it are sums over the tokens of a response.
    """
    return tuple(path_sums(log_policy[: depth + 1]).exp().view(layer.shape) for depth, layer in enumerate(log_policy))


def expectation(visits: Layers, quantity: Layers) -> Tensor:
    r"""Expected sum over a response, :math:`E_{(s, a) \sim d^\pi}[x(s, a)]`.

    Args:
        visits: From `visitation`.
        quantity: Of state-action pairs, each ``(A**h, A)``, or features, each ``(A**h, A, d)``.

    Returns:
        A scalar, or shape ``(d,)``.
    """
    parts = [torch.tensordot(visit, layer, dims=2) for visit, layer in zip(visits, quantity, strict=True)]
    return torch.stack(parts).sum(dim=0)


def expected_kl(log_policy: Layers, log_other: Layers) -> Tensor:
    r"""Divergence between two policies over whole responses, :math:`E_{s \sim d^\pi} KL(\pi(s) \| \pi'(s))`.

    Args:
        log_policy: Log-probabilities of the policy :math:`\pi` that is followed.
        log_other: Log-probabilities of :math:`\pi'`.

    Returns:
        A scalar, in nats.
    """
    ratios = tuple(policy - other for policy, other in zip(log_policy, log_other, strict=True))
    return expectation(visitation(log_policy), ratios)
