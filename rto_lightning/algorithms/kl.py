"""Estimates of the KL divergence from sampled tokens, and the adaptive KL coefficient."""

from typing import Literal

import torch
from torch import Tensor

from rto_lightning.algorithms.masks import zero_outside

KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(
    policy_logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor, estimator: KLEstimator = "k1"
) -> Tensor:
    r"""Estimate :math:`KL(\pi \,\|\, \pi_{ref})` at every token that was sampled from :math:`\pi`.

    With :math:`d = \log \pi - \log \pi_{ref}` of the sampled token (J. Schulman, "Approximating KL
    divergence", 2020):

    - ``k1`` :math:`= d`: unbiased, of high variance, negative for some tokens; the penalty of the RTO paper.
    - ``k2`` :math:`= d^2 / 2`: biased, of low variance, never negative.
    - ``k3`` :math:`= e^{-d} - 1 + d`: unbiased and never negative.

    Args:
        policy_logprobs: Log-probabilities of the sampled tokens under the policy, shape ``(B, T)``.
        reference_logprobs: The same under the reference, shape ``(B, T)``.
        mask: Boolean, shape ``(B, T)``.
        estimator: ``"k1"``, ``"k2"`` or ``"k3"``.

    Returns:
        Shape ``(B, T)``, zero outside the mask.

    Raises:
        ValueError: If the estimator is unknown.

    Example:
        >>> policy, reference = torch.tensor([[0.50]]).log(), torch.tensor([[0.25]]).log()
        >>> mask = torch.tensor([[True]])
        >>> kl_estimate(policy, reference, mask), kl_estimate(policy, reference, mask, "k3")
        (tensor([[0.6931]]), tensor([[0.1931]]))
    """
    log_ratio = zero_outside(policy_logprobs - reference_logprobs, mask)
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    if estimator == "k3":
        # expm1, since exp(-d) - 1 has no correct digit left in float32 where d is small.
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"unknown KL estimator {estimator!r}; choose k1, k2 or k3")


def adaptive_kl_coefficient(coefficient: float, kl: float, target: float, horizon: float, samples: int) -> float:
    r"""Move the KL coefficient so that the KL comes nearer to a target (Ziegler et al., arXiv 1909.08593).

    .. math::
        e = \operatorname{clamp}\Bigl(\frac{KL - KL_{target}}{KL_{target}}, -0.2, 0.2\Bigr), \qquad
        \beta \leftarrow \beta \Bigl(1 + e\, \frac{samples}{horizon}\Bigr)

    Args:
        coefficient: The current :math:`\beta`.
        kl: Measured KL of a response (summed over its tokens), averaged over the iteration.
        target: The KL to hold, in nats a response.
        horizon: Number of responses over which a lasting error of 20% changes the coefficient by about 20%.
        samples: Number of responses in the iteration.

    Returns:
        The coefficient of the next iteration.

    Raises:
        ValueError: If the target is not positive, or if the horizon is so short that the coefficient could
            reach zero.

    Example:
        >>> round(adaptive_kl_coefficient(0.1, kl=12.0, target=6.0, horizon=10_000, samples=1_000), 6)
        0.102
    """
    if target <= 0:
        raise ValueError(f"the KL target must be positive, but is {target}")
    if samples >= 5 * horizon:
        raise ValueError(f"the KL horizon must be longer than a fifth of the {samples} samples, but is {horizon}")
    error = min(max((kl - target) / target, -0.2), 0.2)
    return coefficient * (1.0 + error * samples / horizon)
