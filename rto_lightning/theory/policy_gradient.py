"""PPO and RTO without sampling: policy optimization by exact expectations, with a critic that has yet to learn.

The rewards of PPO stand at the last token (arXiv 2404.18922, equation 2.3), those of RTO at every token (equation 4.7).
If they sum to the same, up to a constant, they have the same policy gradient: it depends on the returns alone. What
differs is how much of it an advantage estimate shows that trusts a critic: with ``lambda`` below 1, a reward reaches
the tokens before it only as far as the critic announces it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from rto_lightning.theory.implicit_reward import implicit_rewards
from rto_lightning.theory.soft_values import evaluate_policy, soft_value_iteration
from rto_lightning.theory.token_mdp import Layers, TokenMDP, at_last_token, log_softmax, path_sums, random_layers


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings of `optimize_policy`, the same for PPO and RTO."""

    beta: float = 0.1
    """Price of a nat of KL divergence from the reference policy."""
    lam: float = 0.95
    """Lambda of generalized advantage estimation; 1 needs no critic, 0 looks one token ahead."""
    critic_rate: float = 0.1
    """Part of the way to its target that the critic goes in an iteration; it starts at 0 everywhere."""
    step_size: float = 1.0
    """Size of the policy's step: logits move by this times the advantages."""
    iterations: int = 1000
    """Number of steps."""


def expected_gae(
    log_policy: Layers, rewards: Layers, log_reference: Layers, critic: Layers, beta: float, lam: float
) -> Layers:
    r"""Generalized advantage estimates, averaged over what the policy does next (Schulman et al., arXiv 1506.02438).

    .. math::
        \delta(s, a) = r(s, a) - \beta \log \frac{\pi(a | s)}{\pi_{ref}(a | s)} + V(s') - V(s), \qquad
        A(s, a) = \delta(s, a) + \lambda\, E_{a' \sim \pi(s')} A(s', a')

    Discount 1, and a value of 0 after the last token, as in :func:`~rto_lightning.algorithms.generalized_advantages`.

    Args:
        log_policy: Log-probabilities of the policy.
        rewards: Token rewards, without the price of the KL divergence.
        log_reference: Log-probabilities of the reference policy.
        critic: Values of the states as the critic believes them, each ``(A**h,)``.
        beta: Price of a nat of KL divergence.
        lam: :math:`\lambda`.

    Returns:
        Advantages of the state-action pairs.
    """
    advantages = []
    next_values = next_advantages = torch.zeros_like(rewards[-1])
    layers = list(zip(log_policy, rewards, log_reference, critic, strict=True))
    for policy, reward, reference, value in reversed(layers):
        paid = reward - beta * (policy - reference)
        layer = paid + (next_values + lam * next_advantages).view(reward.shape) - value[:, None]
        advantages.append(layer)
        next_values, next_advantages = value, (policy.exp() * layer).sum(dim=1)
    return tuple(reversed(advantages))


def optimize_policy(
    rewards: Layers, true_rewards: Layers, log_reference: Layers, settings: OptimizerSettings
) -> Tensor:
    """Improve a policy by natural policy gradients, from the reference policy on.

    For a policy that has a logit for each state and token, the natural gradient of its value is the advantages
    (S. Kakade, "A natural policy gradient", 2001).

    Args:
        rewards: Token rewards that the optimizer sees.
        true_rewards: Token rewards by which the policies are judged.
        log_reference: Log-probabilities of the reference policy.
        settings: Of the optimizer.

    Returns:
        Suboptimality (equation 3.5) before the first step and after each, shape ``(iterations + 1,)``.
    """
    best = soft_value_iteration(true_rewards, log_reference, settings.beta).start
    log_policy = log_reference
    critic = tuple(torch.zeros_like(layer[:, 0]) for layer in rewards)
    gaps = []
    for iteration in range(settings.iterations + 1):
        gaps.append(best - evaluate_policy(log_policy, true_rewards, log_reference, settings.beta).start)
        if iteration == settings.iterations:
            break
        advantages = expected_gae(log_policy, rewards, log_reference, critic, settings.beta, settings.lam)
        # The critic's targets are the returns of GAE, value plus advantage.
        errors = tuple((policy.exp() * layer).sum(dim=1) for policy, layer in zip(log_policy, advantages, strict=True))
        log_policy = log_softmax(
            tuple(policy + settings.step_size * layer for policy, layer in zip(log_policy, advantages, strict=True))
        )
        critic = tuple(value + settings.critic_rate * error for value, error in zip(critic, errors, strict=True))
    return torch.stack(gaps)


def iterations_to(gaps: Tensor, epsilon: float) -> int | None:
    """First iteration from which on the suboptimality is ``epsilon`` or less; None if there is none in the run.

    Args:
        gaps: From `optimize_policy`.
        epsilon: Largest suboptimality.

    Returns:
        Number of steps.
    """
    outside = (gaps > epsilon).nonzero().flatten()
    if len(outside) == 0:
        return 0
    last = int(outside[-1])
    return None if last == len(gaps) - 1 else last + 1


def ppo_rewards(mdp: TokenMDP, rewards: Layers) -> Layers:
    """What PPO sees of token rewards: their sum, at the last token (equation 2.3).

    Args:
        mdp: The MDP.
        rewards: Token rewards.

    Returns:
        Token rewards.
    """
    return at_last_token(mdp, path_sums(rewards))


def shaped_rewards(mdp: TokenMDP, rewards: Layers, log_dpo: Layers, log_reference: Layers, beta: float) -> Layers:
    """What PPO sees, shaped by a DPO policy that need not be right (RS-PPO of section 5.2).

    The DPO policy's token rewards, and at the last token what the response's reward is more than their sum.

    Args:
        mdp: The MDP.
        rewards: Token rewards.
        log_dpo: Log-probabilities of the DPO policy.
        log_reference: Log-probabilities of the reference policy.
        beta: DPO's beta.

    Returns:
        Token rewards.
    """
    implicit = implicit_rewards(log_dpo, log_reference, beta)
    rest = at_last_token(mdp, path_sums(rewards) - path_sums(implicit))
    return tuple(token + last for token, last in zip(implicit, rest, strict=True))


class Comparison(NamedTuple):
    """Iterations to epsilon-optimality, nan where the run was too short; each of shape ``(len(lams), seeds)``."""

    ppo: Tensor
    """With `ppo_rewards`."""
    rto: Tensor
    """With the `implicit_rewards` of a DPO policy that is right, the optimal one."""
    shaped: Tensor
    """With `shaped_rewards` by a DPO policy that is not."""


def compare_rewards(
    mdp: TokenMDP, lams: Sequence[float], seeds: int, settings: OptimizerSettings, epsilon: float, dpo_error: float
) -> Comparison:
    """Optimize policies for random rewards, normal with a standard deviation of 1/2, and count the iterations.

    Args:
        mdp: The MDP.
        lams: Values of lambda to try, in place of that of the settings.
        seeds: Number of random rewards and reference policies.
        settings: Of the optimizer, the same for all.
        epsilon: Largest suboptimality that counts as optimal.
        dpo_error: The wrong DPO policy is the optimal one for token rewards with an error of this standard deviation.

    Returns:
        The iterations.
    """
    counts = torch.full((3, len(lams), seeds), float("nan"), dtype=torch.float64)
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        rewards = tuple(layer / 2 for layer in random_layers(mdp, generator))
        log_reference = log_softmax(random_layers(mdp, generator))
        errors = random_layers(mdp, generator)
        wrong = tuple(reward + dpo_error * error for reward, error in zip(rewards, errors, strict=True))
        beta = settings.beta
        log_optimal, log_wrong = (soft_value_iteration(x, log_reference, beta).log_policy for x in (rewards, wrong))
        seen = (
            ppo_rewards(mdp, rewards),
            implicit_rewards(log_optimal, log_reference, beta),
            shaped_rewards(mdp, rewards, log_wrong, log_reference, beta),
        )
        for row, lam in enumerate(lams):
            for kind, seen_rewards in enumerate(seen):
                gaps = optimize_policy(seen_rewards, rewards, log_reference, replace(settings, lam=lam))
                reached = iterations_to(gaps, epsilon)
                if reached is not None:
                    counts[kind, row, seed] = reached
    return Comparison(*counts)
