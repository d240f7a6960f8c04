"""Responses that another engine sampled than the model that is trained: how far the two differ, and a correction."""

from torch import Tensor

from rto_lightning.algorithms.kl import kl_estimate
from rto_lightning.algorithms.masks import masked_mean, zero_outside


def truncated_importance_weights(logprobs: Tensor, engine_logprobs: Tensor, mask: Tensor, cap: float) -> Tensor:
    r"""Weights that make the policy gradient on an engine's samples one of the policy, truncated against variance.

    .. math::
        w_t = \min\Bigl(\frac{\pi_{old}(y_t)}{\pi_{engine}(y_t)},\ C\Bigr)

    Truncated importance sampling for rollout engines: Yao et al., "Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training" (2025); `tis_imp_ratio_cap` of verl. The policy loss is homogeneous in the advantage for
    weights of 0 and more, so that multiplying advantages multiplies each token's loss.

    Args:
        logprobs: Of the sampled tokens under the policy that is trained, at the start of the iteration, ``(B, T)``.
        engine_logprobs: The same as the engine that sampled has them, ``(B, T)``.
        mask: Boolean, ``(B, T)``.
        cap: :math:`C`, above 0.

    Returns:
        Shape ``(B, T)``, without gradient, zero outside the mask.

    Raises:
        ValueError: If the cap is not above 0.

    Example:
        >>> logprobs, engine_logprobs = torch.tensor([[0.50, 0.50]]).log(), torch.tensor([[0.25, 0.50]]).log()
        >>> truncated_importance_weights(logprobs, engine_logprobs, torch.ones(1, 2, dtype=torch.bool), cap=1.5)
        tensor([[1.5000, 1.0000]])
    """
    if not cap > 0:
        raise ValueError(f"the cap of importance weights must be above 0, but is {cap}")
    log_ratio = zero_outside(logprobs - engine_logprobs, mask).detach()
    return zero_outside(log_ratio.exp().clamp(max=cap), mask)


def engine_mismatch(logprobs: Tensor, engine_logprobs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    r"""How far the policy is from the engine that sampled for it.

    Args:
        logprobs: Of the sampled tokens under the policy that is trained, ``(B, T)``.
        engine_logprobs: The same as the engine has them, ``(B, T)``.
        mask: Boolean, ``(B, T)``.

    Returns:
        Two scalars, means over all tokens in nats: :math:`|\log \pi - \log \pi_{engine}|`, and the k3 estimate of
        :math:`KL(\pi_{engine} \,\|\, \pi)`, see :func:`kl_estimate`.

    Example:
        >>> logprobs, engine_logprobs = torch.tensor([[0.50, 0.50]]).log(), torch.tensor([[0.25, 0.50]]).log()
        >>> engine_mismatch(logprobs, engine_logprobs, torch.ones(1, 2, dtype=torch.bool))
        (tensor(0.3466), tensor(0.1534))
    """
    distance = masked_mean(zero_outside(logprobs - engine_logprobs, mask).abs(), mask)
    return distance, masked_mean(kl_estimate(engine_logprobs, logprobs, mask, "k3"), mask)
