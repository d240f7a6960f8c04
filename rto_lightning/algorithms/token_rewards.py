"""The token rewards of RTO: what a DPO policy says about every token (arXiv 2404.18922), and where it is put."""

from typing import Literal

import torch
from torch import Tensor

from rto_lightning.algorithms.masks import last_token_index, masked_sum, place_at_last_token, zero_outside

Granularity = Literal["token", "sentence", "delayed", "shaping"]


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

    Example:
        >>> dpo, reference = torch.tensor([[0.4, 0.2]]).log(), torch.tensor([[0.2, 0.4]]).log()
        >>> token_rewards(dpo, reference, torch.ones(1, 2, dtype=torch.bool), beta_1=0.1, clip=0.0)
        tensor([[ 0.0693, -0.0693]])
        >>> token_rewards(dpo, reference, torch.ones(1, 2, dtype=torch.bool), beta_1=0.1, clip=0.05)
        tensor([[ 0.0500, -0.0500]])
    """
    log_ratio = zero_outside(dpo_logprobs - reference_logprobs, mask)
    return clamp_magnitude(beta_1 * log_ratio, clip)


def move_token_rewards(
    rewards: Tensor, mask: Tensor, granularity: Granularity, sentence_ends: Tensor | None = None
) -> Tensor:
    r"""Put token rewards, already scaled and clipped, where an ablation of RTO wants them.

    - ``token`` (RTO): where they are.
    - ``sentence`` (Semi-RTO): each sentence's sum on the token that ends it; what follows the last end goes to the last
      token.
    - ``delayed`` (DDPO): the whole sum on the last token.
    - ``shaping`` (RS-PPO): where they are, and the whole sum is taken off again on the last token:

      .. math::
          r'_t = r_t - [t = \text{last}] \sum_k r_k

    The first three keep the sum of a response. With ``shaping`` it is 0, so that token rewards say when, but not how
    much, is earned; with a discount below 1 that holds for the plain sum only, not for the discounted one.

    Args:
        rewards: Shape ``(B, T)``.
        mask: Boolean, shape ``(B, T)``.
        granularity: ``"token"``, ``"sentence"``, ``"delayed"`` or ``"shaping"``.
        sentence_ends: True on the tokens that end a sentence; boolean, shape ``(B, T)``. Read by ``sentence`` only.

    Returns:
        Shape ``(B, T)``, zero outside the mask.

    Raises:
        ValueError: If the granularity is unknown, or is ``sentence`` and ``sentence_ends`` is missing.

    Example:
        >>> rewards, mask = torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(1, 3, dtype=torch.bool)
        >>> move_token_rewards(rewards, mask, "delayed")
        tensor([[0., 0., 6.]])
        >>> move_token_rewards(rewards, mask, "sentence", sentence_ends=torch.tensor([[False, True, False]]))
        tensor([[0., 3., 3.]])
    """
    rewards = zero_outside(rewards, mask)
    if granularity == "token":
        return rewards
    if granularity == "sentence":
        if sentence_ends is None:
            raise ValueError("granularity sentence needs sentence_ends; give them, or choose another granularity")
        return _sum_sentences(rewards, mask, sentence_ends)
    whole = place_at_last_token(masked_sum(rewards, mask, dim=1), mask)
    if granularity == "delayed":
        return whole
    if granularity == "shaping":
        return rewards - whole
    raise ValueError(f"unknown granularity {granularity!r}; choose token, sentence, delayed or shaping")


def _sum_sentences(rewards: Tensor, mask: Tensor, sentence_ends: Tensor) -> Tensor:
    positions = torch.arange(mask.shape[1], device=mask.device)
    ends = (sentence_ends & mask) | (positions == last_token_index(mask)[:, None])
    # The number of ends before a token says which sentence it is in. Each sentence is summed by itself: differences of
    # a running sum would lose digits in float32.
    sentence = ends.cumsum(dim=1) - ends.long()
    sums = torch.zeros_like(rewards).scatter_add(1, sentence, rewards)
    return zero_outside(sums.gather(1, sentence), ends)


def clamp_magnitude(x: Tensor, limit: float) -> Tensor:
    """Clamp to ``[-limit, limit]``, where a limit of 0 means none.

    Args:
        x: Any shape.
        limit: Largest magnitude, or 0.

    Returns:
        The shape of ``x``.

    Raises:
        ValueError: If ``limit`` is negative: torch would set every element to it.

    Example:
        >>> clamp_magnitude(torch.tensor([-3.0, 0.5]), limit=1.0)
        tensor([-1.0000,  0.5000])
    """
    if limit < 0:
        raise ValueError(f"a clipping limit cannot be negative, but is {limit}; 0 switches clipping off")
    return x.clamp(-limit, limit) if limit > 0 else x
