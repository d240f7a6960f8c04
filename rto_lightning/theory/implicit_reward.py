"""What DPO learns, as a token reward: the soft advantage (arXiv 2404.18922, equations 4.3 to 4.5)."""

import torch
from torch import Tensor

from rto_lightning.algorithms import dpo_loss, token_rewards
from rto_lightning.theory.convex import lbfgs
from rto_lightning.theory.token_mdp import Layers, TokenMDP, log_softmax, path_sums


def expected_dpo_loss(log_policy: Layers, log_reference: Layers, sentence_rewards: Tensor, beta: float) -> Tensor:
    r"""DPO's loss on endless data: every two responses, labelled by Bradley and Terry (equations 3.1 and 4.4).

    .. math::
        E_{y^1, y^2}\bigl[P(y^1 \succ y^2)\, L(y^1, y^2)\bigr]

    with :math:`L` of :func:`~rto_lightning.algorithms.dpo_loss` and both responses uniform.

    Args:
        log_policy: Log-probabilities of the policy.
        log_reference: Log-probabilities of the reference policy.
        sentence_rewards: Reward of each response, shape ``(A**H,)``.
        beta: DPO's beta.

    Returns:
        A scalar.
    """
    chosen, rejected = torch.cartesian_prod(torch.arange(len(sentence_rewards)), torch.arange(len(sentence_rewards))).T
    policy, reference = path_sums(log_policy), path_sums(log_reference)
    losses = dpo_loss(policy[chosen], policy[rejected], reference[chosen], reference[rejected], beta).losses
    return (torch.sigmoid(sentence_rewards[chosen] - sentence_rewards[rejected]) * losses).mean()


def train_dpo(mdp: TokenMDP, log_reference: Layers, sentence_rewards: Tensor, beta: float) -> Layers:
    """Minimize `expected_dpo_loss` over all policies, from the reference on, knowing no value and no token reward.

    Args:
        mdp: The MDP.
        log_reference: Log-probabilities of the reference policy.
        sentence_rewards: Reward of each response, shape ``(A**H,)``.
        beta: DPO's beta.

    Returns:
        Log-probabilities of the trained policy.
    """

    def policy(logits: Tensor) -> Layers:
        parts = logits.split([rows * columns for rows, columns in mdp.layer_shapes])
        return log_softmax(tuple(part.view(shape) for part, shape in zip(parts, mdp.layer_shapes, strict=True)))

    start = torch.cat([layer.flatten() for layer in log_reference])
    return policy(lbfgs(lambda logits: expected_dpo_loss(policy(logits), log_reference, sentence_rewards, beta), start))


def implicit_rewards(log_policy: Layers, log_reference: Layers, beta: float) -> Layers:
    r"""Token rewards of a DPO policy, :math:`\beta \log (\pi / \pi_{ref})` (equation 4.5), without clipping.

    They are those of :func:`~rto_lightning.algorithms.token_rewards`, with which RTO trains.
    """
    return tuple(
        token_rewards(policy, reference, torch.ones_like(policy, dtype=torch.bool), beta_1=beta, clip=0)
        for policy, reference in zip(log_policy, log_reference, strict=True)
    )


def soft_advantages(rewards: Layers, values: Layers) -> Layers:
    r"""The rewards, shaped by the potential :math:`V` (A. Ng, D. Harada, S. Russell, 1999).

    .. math::
        r(s, a) + V(s') - V(s)

    with 0 after the last token. If :math:`V` is the optimal value :math:`V^*_\beta`, this is the soft advantage, and
    equals :math:`\beta \log (\pi^*_\beta / \pi_{ref})` (from equations 3.3 and 3.4). Over a response the potential sums
    to :math:`-V(s_1)`, the same for all: no preference and no optimal policy changes.

    Args:
        rewards: Token rewards.
        values: Values of the states.

    Returns:
        Token rewards.
    """
    after = (*values[1:], torch.zeros_like(rewards[-1]))
    return tuple(
        reward + following.view(reward.shape) - value[:, None]
        for reward, following, value in zip(rewards, after, values, strict=True)
    )
