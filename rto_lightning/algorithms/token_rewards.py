"""The token rewards of RTO: what a DPO policy says about every token (arXiv 2404.18922)."""

from torch import Tensor

from rto_lightning.algorithms.masks import zero_outside


def token_rewards(dpo_logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor, beta_1: float, clip: float) -> Tensor:
    r"""Scaled log-ratio of the DPO policy and its reference, clipped.

    .. math::
        r_t = \operatorname{clamp}\Bigl(\beta_1 \log \frac{\pi_{dpo}(y_t \mid x, y_{<t})}
              {\pi_{ref}(y_t \mid x, y_{<t})},\, -c,\, c\Bigr)

    The ratio is scaled first and clipped after, so ``c`` is in units of reward: with the paper's
    :math:`\beta_1 = c = 0.05` log-ratios beyond 1 nat are cut.

    Args:
        dpo_logprobs: Log-probabilities of the sampled tokens under the DPO policy, shape ``(B, T)``.
        reference_logprobs: The same under the reference that the DPO policy was trained against, shape
            ``(B, T)``.
        mask: Boolean, shape ``(B, T)``.
        beta_1: Scale of the token rewards.
        clip: Largest magnitude of a token reward; 0 is no clipping.

    Returns:
        Shape ``(B, T)``, zero outside the mask.

    Raises:
        ValueError: If ``clip`` is negative.
    """
    log_ratio = zero_outside(dpo_logprobs - reference_logprobs, mask)
    return clamp_magnitude(beta_1 * log_ratio, clip)


def clamp_magnitude(x: Tensor, limit: float) -> Tensor:
    """Clamp to ``[-limit, limit]``, where a limit of 0 means none.

    Args:
        x: Any shape.
        limit: Largest magnitude, or 0.

    Returns:
        The shape of ``x``.

    Raises:
        ValueError: If ``limit`` is negative: torch would set every element to it.
    """
    if limit < 0:
        raise ValueError(f"a clipping limit cannot be negative, but is {limit}; 0 switches clipping off")
    return x.clamp(-limit, limit) if limit > 0 else x
