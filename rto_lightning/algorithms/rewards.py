"""The reward of RTO, term by term (arXiv 2404.18922)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rto_lightning.algorithms.kl import KLEstimator, kl_estimate
from rto_lightning.algorithms.masks import place_at_last_token
from rto_lightning.algorithms.token_rewards import Granularity, clamp_magnitude, move_token_rewards, token_rewards


@dataclass(frozen=True)
class RewardTerms:
    """The three summands of the reward, kept apart to be logged; each ``(B, T)``, zero outside the mask."""

    token: Tensor
    """Token rewards of the DPO policy: scaled, then clipped, then moved to where the granularity puts them."""
    kl: Tensor
    """KL penalty, sign and coefficient included: it is added, not subtracted."""
    score: Tensor
    """Sentence-level score less the penalties of the response's length, on the last token of each response."""

    @property
    def total(self) -> Tensor:
        """The reward that the policy is trained on, shape ``(B, T)``."""
        return self.token + self.kl + self.score


def compose_rewards(
    policy_logprobs: Tensor,
    reference_logprobs: Tensor,
    dpo_logprobs: Tensor | None,
    dpo_reference_logprobs: Tensor | None,
    scores: Tensor | None,
    mask: Tensor,
    *,
    beta_1: float,
    beta_2: float,
    beta_3: float,
    token_reward_clip: float,
    score_clip: float,
    kl_estimator: KLEstimator = "k1",
    truncated: Tensor | None = None,
    truncation_penalty: float = 0.0,
    granularity: Granularity = "token",
    sentence_ends: Tensor | None = None,
    min_response_tokens: int = 0,
    short_penalty: float = 0.0,
) -> RewardTerms:
    r"""The reward of every token.

    .. math::
        r_t = \beta_1 \log \frac{\pi_{dpo}}{\pi_{ref}} - \beta_2 \log \frac{\pi}{\pi_{ref}}
              + [t = \text{last}]\, \beta_3\, r_{RM}(x, y)

    PPO is :math:`\beta_1 = 0`. On top of the equation the token rewards are clipped after scaling and can then be
    moved, the score is clipped before scaling, and truncated and too short responses can pay penalties, which
    :math:`\beta_3` does not scale.

    Args:
        policy_logprobs: Log-probabilities of the sampled tokens under the policy, shape ``(B, T)``.
        reference_logprobs: The same under the reference of the KL penalty, shape ``(B, T)``.
        dpo_logprobs: The same under the DPO policy, shape ``(B, T)``; None where ``beta_1`` is 0.
        dpo_reference_logprobs: The same under the reference of DPO, shape ``(B, T)``; None takes
            ``reference_logprobs``.
        scores: Sentence-level reward :math:`r_{RM}`, shape ``(B,)``; None where ``beta_3`` is 0.
        mask: Boolean, shape ``(B, T)``.
        beta_1: Scale of the token rewards.
        beta_2: Coefficient of the KL penalty.
        beta_3: Scale of the sentence-level reward.
        token_reward_clip: Largest magnitude of a token reward; 0 is no clipping.
        score_clip: Largest magnitude of a score; 0 is no clipping.
        kl_estimator: ``"k1"`` (the paper's), ``"k2"`` or ``"k3"``, see :func:`kl_estimate`.
        truncated: True for responses that hit the length limit; boolean, shape ``(B,)``.
        truncation_penalty: Subtracted on the last token of truncated responses.
        granularity: Where the token rewards are put, see :func:`move_token_rewards`.
        sentence_ends: True on the tokens that end a sentence; boolean, shape ``(B, T)``. For granularity ``sentence``.
        min_response_tokens: Responses with fewer tokens, the stop token included, are too short.
        short_penalty: Subtracted on the last token of too short responses. One without any token has no last one.

    Returns:
        The terms of the reward.

    Raises:
        ValueError: If the input of a term whose coefficient is not 0 is missing, a clip is negative, the KL estimator
            or the granularity is unknown, or granularity ``sentence`` lacks its ``sentence_ends``.

    Example:
        >>> reference, dpo = torch.tensor([[0.50, 0.50]]).log(), torch.tensor([[0.25, 0.50]]).log()
        >>> mask, scales = torch.ones(1, 2, dtype=torch.bool), {"beta_1": 0.1, "beta_2": 0.01, "beta_3": 3.0}
        >>> scores = torch.tensor([2.0])
        >>> terms = compose_rewards(
        ...     reference, reference, dpo, None, scores, mask, **scales, token_reward_clip=0.05, score_clip=10.0
        ... )
        >>> terms.token, terms.score
        (tensor([[-0.0500,  0.0000]]), tensor([[0., 6.]]))
    """
    for name, given, coefficient_name, coefficient in (
        ("dpo_logprobs", dpo_logprobs, "beta_1", beta_1),
        ("scores", scores, "beta_3", beta_3),
        ("truncated", truncated, "truncation_penalty", truncation_penalty),
    ):
        if given is None and coefficient != 0:
            raise ValueError(f"{coefficient_name} is {coefficient}, which needs {name}; give it, or set it to 0")

    if dpo_logprobs is None:
        token = torch.zeros_like(policy_logprobs)
    else:
        dpo_reference = reference_logprobs if dpo_reference_logprobs is None else dpo_reference_logprobs
        token = token_rewards(dpo_logprobs, dpo_reference, mask, beta_1, token_reward_clip)
        token = move_token_rewards(token, mask, granularity, sentence_ends)

    kl = -beta_2 * kl_estimate(policy_logprobs, reference_logprobs, mask, kl_estimator)

    terminal = policy_logprobs.new_zeros(mask.shape[0])
    if scores is not None:
        terminal = terminal + beta_3 * clamp_magnitude(scores, score_clip)
    if truncated is not None:
        terminal = torch.where(truncated, terminal - truncation_penalty, terminal)
    short = mask.sum(dim=1) < min_response_tokens
    terminal = torch.where(short, terminal - short_penalty, terminal)
    return RewardTerms(token=token, kl=kl, score=place_at_last_token(terminal, mask))
