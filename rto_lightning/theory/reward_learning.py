"""Linear token rewards from preferences, and how far they can be off (arXiv 2404.18922, section 4.1 and appendix A)."""

import math

import torch
from torch import Tensor

from rto_lightning.algorithms import bradley_terry_loss
from rto_lightning.theory.convex import minimize
from rto_lightning.theory.preferences import Preferences


def maximum_likelihood(response_features: Tensor, preferences: Preferences, bound: float) -> Tensor:
    r"""Maximum likelihood estimate of theta within a ball (equation 4.1).

    .. math::
        \hat\theta = \arg\max_{\|\theta\| \le B} \sum_{(\tau^w, \tau^l)}
            \log \sigma\Bigl(\sum_h \phi(s^w_h, a^w_h)^\top \theta - \sum_h \phi(s^l_h, a^l_h)^\top \theta\Bigr)

    A direction in which no pair differs stays at 0.

    Args:
        response_features: Features summed over the tokens of each response, shape ``(A**H, d)``.
        preferences: The data.
        bound: :math:`B`.

    Returns:
        Shape ``(d,)``, of norm ``bound`` at most.
    """
    # Equal comparisons are counted: there are few responses, and there may be a million pairs.
    responses = response_features.shape[0]
    pairs, counts = (preferences.chosen * responses + preferences.rejected).unique(return_counts=True)
    chosen, rejected = pairs // responses, pairs % responses
    shares: Tensor = counts / counts.sum(dtype=torch.float64)

    def negative_log_likelihood(theta: Tensor) -> Tensor:
        scores = response_features @ theta
        return shares @ bradley_terry_loss(scores[chosen], scores[rejected])

    theta = minimize(
        negative_log_likelihood,
        start=response_features.new_zeros(response_features.shape[1]),
        constraints=[lambda theta: theta.square().sum() / bound**2 - 1],
    )
    return project_to_ball(theta, bound)


def project_to_ball(theta: Tensor, bound: float) -> Tensor:
    """Nearest point of norm ``bound`` at most: takes off the solver's last digits, which are outside."""
    norm: float = theta.norm().item()
    return theta * min(1.0, bound / max(norm, 1e-300))


def covariance(response_features: Tensor, preferences: Preferences, regularization: float) -> Tensor:
    r"""Covariance of the feature differences (below equation 4.2).

    .. math::
        \Sigma_D = \sum_{(\tau^1, \tau^2)} x x^\top + \lambda I, \qquad
        x = \sum_h \phi(s^1_h, a^1_h) - \phi(s^2_h, a^2_h)

    Args:
        response_features: Features summed over the tokens of each response, shape ``(A**H, d)``.
        preferences: The data.
        regularization: :math:`\lambda`, above 0.

    Returns:
        Shape ``(d, d)``.
    """
    differences = response_features[preferences.chosen] - response_features[preferences.rejected]
    return differences.T @ differences + regularization * torch.eye(differences.shape[1], dtype=torch.float64)


def weighted_norm(x: Tensor, weight: Tensor) -> Tensor:
    r"""Norm of the last dimension, :math:`\|x\|_M = \sqrt{x^\top M x}`.

    Args:
        x: Shape ``(..., d)``.
        weight: :math:`M`, symmetric and positive definite, shape ``(d, d)``.

    Returns:
        The shape of ``x`` without its last dimension.
    """
    norms: Tensor = (x @ torch.linalg.cholesky(weight)).norm(dim=-1)
    return norms


def confidence_radius(
    dimension: int, largest_difference: float, bound: float, regularization: float, failure_probability: float
) -> float:
    r"""How far the estimate can be from the truth, with explicit constants: rho of lemma A.1.

    With probability :math:`1 - \delta` over the labels of given pairs, :math:`\|\hat\theta - \theta^*\|_{\Sigma_D}`
    is at most

    .. math::
        \varrho = \frac{1}{2 \Upsilon} \sqrt{d + 2 \sqrt{d t} + 2 t} + 2 B \sqrt{\lambda}, \qquad
        \Upsilon = \frac{1}{2 + e^{-M} + e^{M}}, \quad M = B \max_i \|x_i\|, \quad t = \log(1 / \delta)

    Equation A.2 leaves an absolute constant open, and refers to Zhu et al. (arXiv 2301.11270, lemma 3.1) among others.
    This is their argument with its constants. Let :math:`\Delta = \hat\theta - \theta^*`, and :math:`g` be the gradient
    of the negative log-likelihood at the truth. On the ball its curvature is at least :math:`\Upsilon (\Sigma_D -
    \lambda I)`, and at the minimizer it does not fall towards the truth, so :math:`\Upsilon \|\Delta\|^2_{\Sigma_D -
    \lambda I} \le -g^\top \Delta \le \|g\|_{\Sigma_D^{-1}} \|\Delta\|_{\Sigma_D}`. Here :math:`\lambda
    \|\Delta\|^2 \le 4 \lambda B^2`, and :math:`g` is a sum of independent :math:`\epsilon_i x_i`, each
    :math:`\epsilon_i` of mean 0 within an interval of length 1, whence :math:`\|g\|_{\Sigma_D^{-1}} \le \frac{1}{2}
    \sqrt{d + 2 \sqrt{d t} + 2 t}` (D. Hsu, S. Kakade, T. Zhang, "A tail inequality for quadratic forms of subgaussian
    random vectors", 2012). As in Zhu et al., :math:`\Upsilon` stands outside of the root. The paper's :math:`M` is
    :math:`2 H L B`, which is never smaller.

    Args:
        dimension: :math:`d`.
        largest_difference: :math:`\max_i \|x_i\|`, over the pairs of the data.
        bound: :math:`B`, that :math:`\|\theta^*\|` keeps.
        regularization: :math:`\lambda`.
        failure_probability: :math:`\delta`.

    Returns:
        :math:`\varrho`.
    """
    t = math.log(1 / failure_probability)
    curvature = 1 / (2 + 2 * math.cosh(bound * largest_difference))
    noise = math.sqrt(dimension + 2 * math.sqrt(dimension * t) + 2 * t) / 2
    return noise / curvature + 2 * bound * math.sqrt(regularization)
