"""The losses of PPO (Schulman et al., arXiv 1707.06347) on tokens of responses."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rto_lightning.algorithms.masks import masked_mean, masked_sum, zero_outside

Aggregation = Literal["sequence", "token"]


def aggregate(
    losses: Tensor,
    mask: Tensor,
    aggregation: Aggregation = "sequence",
    denominator: float | Tensor | None = None,
) -> Tensor:
    r"""One loss from the losses of tokens.

    - ``sequence``: mean over each response's tokens, then over responses. Every response weighs the same.
    - ``token``: mean over all tokens. Every token weighs the same, so long responses weigh more.

    A minibatch that is split into microbatches needs the ``denominator`` of the whole: the number of its
    responses (``sequence``) or of its tokens (``token``). The microbatches' losses then sum to the loss of
    the minibatch. Responses without tokens add nothing and are not counted.

    Args:
        losses: Shape ``(B, T)``.
        mask: Boolean, shape ``(B, T)``.
        aggregation: ``"sequence"`` or ``"token"``.
        denominator: What the sum over responses, or tokens, is divided by; None counts those given here.

    Returns:
        A scalar.

    Raises:
        ValueError: If the aggregation is unknown.

    Example:
        >>> losses, mask = torch.tensor([[1.0, 1.0], [4.0, 0.0]]), torch.tensor([[True, True], [True, False]])
        >>> aggregate(losses, mask, "sequence"), aggregate(losses, mask, "token")
        (tensor(2.5000), tensor(2.))
    """
    if aggregation == "sequence":
        total = masked_mean(losses, mask, dim=1).sum()
        count = mask.any(dim=1).sum()
    elif aggregation == "token":
        total = masked_sum(losses, mask)
        count = mask.sum()
    else:
        raise ValueError(f"unknown aggregation {aggregation!r}; choose sequence or token")
    return total / (count.clamp(min=1) if denominator is None else denominator)


@dataclass(frozen=True)
class PolicyLossStatistics:
    """What happened to the tokens of a microbatch: detached scalars.

    ``a + b`` are the statistics of two microbatches together. Divide by ``tokens`` for means.
    """

    clipped: Tensor
    """Number of tokens whose gradient the clipping, or the dual clipping, removed."""
    approximate_kl: Tensor
    """Sum over tokens of the k3 estimate of KL(old policy || policy), in nats."""
    ratio_deviation: Tensor
    """Largest ``|ratio - 1|``; at the first minibatch of an iteration it should be 0 up to rounding."""
    tokens: Tensor
    """Number of tokens."""

    def __add__(self, other: "PolicyLossStatistics") -> "PolicyLossStatistics":
        return PolicyLossStatistics(
            clipped=self.clipped + other.clipped,
            approximate_kl=self.approximate_kl + other.approximate_kl,
            ratio_deviation=torch.maximum(self.ratio_deviation, other.ratio_deviation),
            tokens=self.tokens + other.tokens,
        )


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float,
    aggregation: Aggregation = "sequence",
    denominator: float | Tensor | None = None,
    dual_clip: float | None = None,
) -> tuple[Tensor, PolicyLossStatistics]:
    r"""Clipped surrogate loss (equation 7 of the PPO paper, negated).

    .. math::
        L_t = -\min\bigl(\rho_t A_t,\ \operatorname{clamp}(\rho_t, 1 - \epsilon, 1 + \epsilon) A_t\bigr),
        \quad \rho_t = \pi(y_t) / \pi_{old}(y_t)

    Where the advantage is negative and the ratio large, this loss has no bound. Dual clipping (Ye et al., arXiv
    1912.09729, equation 4) gives it one:

    .. math::
        L^{dual}_t = \min(L_t,\ -c A_t) \quad \text{where } A_t < 0

    Args:
        logprobs: Log-probabilities of the sampled tokens under the policy being trained, shape ``(B, T)``.
        old_logprobs: The same at the start of the iteration, without gradient, shape ``(B, T)``.
        advantages: Without gradient, shape ``(B, T)``.
        mask: Boolean, shape ``(B, T)``.
        clip_range: :math:`\epsilon`.
        aggregation: ``"sequence"`` or ``"token"``, see :func:`aggregate`.
        denominator: See :func:`aggregate`.
        dual_clip: :math:`c`, above 1; None is no dual clipping.

    Returns:
        The loss, a scalar, and its statistics.

    Raises:
        ValueError: If the aggregation is unknown, or ``dual_clip`` is not above 1: the loss would then be cut where
            the policy has not moved yet.

    Example:
        >>> logprobs, old_logprobs = torch.tensor([[0.6, 0.4]]).log(), torch.tensor([[0.4, 0.4]]).log()
        >>> mask = torch.ones(1, 2, dtype=torch.bool)
        >>> loss, statistics = policy_loss(logprobs, old_logprobs, torch.tensor([[1.0, -1.0]]), mask, clip_range=0.2)
        >>> loss, statistics.clipped  # the ratio 1.5 counts as 1.2
        (tensor(-0.1000), tensor(1))
    """
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be above 1, but is {dual_clip}; None switches it off")
    log_ratio = zero_outside(logprobs - old_logprobs, mask)
    advantages = zero_outside(advantages, mask)
    ratio = log_ratio.exp()
    unclipped = -ratio * advantages
    clipped = -ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    losses = torch.maximum(unclipped, clipped)
    without_gradient = clipped > unclipped
    if dual_clip is not None:
        bound = -dual_clip * advantages
        beyond = (advantages < 0) & (losses > bound)
        losses = torch.where(beyond, bound, losses)
        without_gradient = without_gradient | beyond
    loss = aggregate(losses, mask, aggregation, denominator)

    with torch.no_grad():
        statistics = PolicyLossStatistics(
            clipped=without_gradient.sum(),
            approximate_kl=(torch.expm1(log_ratio) - log_ratio).sum(),
            ratio_deviation=torch.expm1(log_ratio).abs().amax(),
            tokens=mask.sum(),
        )
    return loss, statistics


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    value_clip_range: float | None,
    aggregation: Aggregation = "sequence",
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Squared error of the critic, with the critic held near its old values.

    .. math::
        L_t = \tfrac12 \max\bigl((V_t - R_t)^2,\
              (V^{old}_t + \operatorname{clamp}(V_t - V^{old}_t, -\epsilon, \epsilon) - R_t)^2\bigr)

    The clipping is not in the PPO paper but in its authors' code (openai/baselines ``ppo2``).

    Args:
        values: Of the critic being trained, shape ``(B, T)``.
        old_values: The same at the start of the iteration, without gradient, shape ``(B, T)``.
        returns: Without gradient, shape ``(B, T)``.
        mask: Boolean, shape ``(B, T)``.
        value_clip_range: :math:`\epsilon`; None is the plain squared error.
        aggregation: ``"sequence"`` or ``"token"``, see :func:`aggregate`.
        denominator: See :func:`aggregate`.

    Returns:
        The loss, a scalar, and the number of tokens whose gradient the clipping removed, a detached scalar.

    Raises:
        ValueError: If the aggregation is unknown.

    Example:
        >>> one, mask = torch.tensor([[1.0]]), torch.tensor([[True]])
        >>> value_loss(values=one, old_values=0 * one, returns=one, mask=mask, value_clip_range=0.2)
        (tensor(0.3200), tensor(1))
    """
    values = zero_outside(values, mask)
    old_values = zero_outside(old_values, mask)
    returns = zero_outside(returns, mask)
    errors = (values - returns).square()
    if value_clip_range is None:
        clipped = torch.zeros_like(mask)
    else:
        change = values - old_values
        clipped_values = old_values + change.clamp(-value_clip_range, value_clip_range)
        clipped_errors = (clipped_values - returns).square()
        # Inside the range the two errors differ by rounding only, which must not count as clipping.
        clipped = (change.abs() > value_clip_range) & (clipped_errors > errors)
        errors = torch.maximum(errors, clipped_errors)
    return aggregate(0.5 * errors, mask, aggregation, denominator), clipped.sum()


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    r"""Share of the variance of the returns that the critic explains.

    .. math::
        1 - \operatorname{Var}[R - V] / \operatorname{Var}[R]

    Args:
        values: Shape ``(B, T)``.
        returns: Shape ``(B, T)``.
        mask: Boolean, shape ``(B, T)``.

    Returns:
        A scalar: 1 for a perfect critic, 0 for a constant one, negative for a worse one; nan where all
        returns are equal.

    Example:
        >>> returns, mask = torch.tensor([[0.0, 2.0]]), torch.ones(1, 2, dtype=torch.bool)
        >>> explained_variance(returns, returns, mask), explained_variance(torch.ones(1, 2), returns, mask)
        (tensor(1.), tensor(0.))
    """
    residual_variance = _masked_variance(returns - values, mask)
    variance = _masked_variance(returns, mask)
    return torch.where(variance > 0, 1 - residual_variance / variance, torch.nan)


def _masked_variance(x: Tensor, mask: Tensor) -> Tensor:
    return masked_mean((x - masked_mean(x, mask)).square(), mask)
