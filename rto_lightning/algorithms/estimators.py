r"""Estimators of the advantage: with a critic, or from what other responses to the same prompt earned.

Their papers without a critic know one reward a response. Here every token may earn one, so a response has a sentence
term (the score, for the response as a whole) and a dense term (token rewards and the KL penalty, which is part of the
reward throughout this package and no loss of its own). Each term needs its own baseline. The score is one number a
response, compared with the scores of the other responses. The dense term counts, for a token, from that token on only;
what is left to earn shrinks towards the end of a response, so the return-to-go is compared with that of the other
responses *at the same position*. Compared with their whole sums, late tokens would look bad for being late.

For RLOO this leaves the policy gradient unbiased: at a position, the mean over the other responses that are still
running there does not depend on what this response does, and without any the baseline is 0. (The other responses need
not be in the same state; that costs variance, not bias.) GRPO is biased as it is in its paper: its baseline of the
sentence term contains the response itself, and it divides by a standard deviation that does too.
"""

from typing import Literal

import torch
from torch import Tensor

from rto_lightning.algorithms.advantages import generalized_advantages, return_to_go
from rto_lightning.algorithms.masks import masked_mean, masked_sum, zero_outside
from rto_lightning.algorithms.rewards import RewardTerms

Estimator = Literal["gae", "reinforce++", "rloo", "grpo"]

GROUP_ESTIMATORS: frozenset[Estimator] = frozenset({"rloo", "grpo"})
"""Those that compare several responses to one prompt."""
WHITENED_ESTIMATORS: frozenset[Estimator] = frozenset({"gae", "reinforce++"})
"""Those whose papers or common implementations whiten the advantages of a batch, which is left to the caller."""


def estimate_advantages(
    estimator: Estimator,
    terms: RewardTerms,
    mask: Tensor,
    gamma: float,
    lam: float,
    values: Tensor | None = None,
    group_size: int = 1,
) -> tuple[Tensor, Tensor]:
    r"""Advantages, not whitened, and returns.

    With :math:`s_i` the score of response :math:`i` of the ``group_size`` ones to a prompt, and :math:`G_{i,t}` the
    return-to-go of its dense term:

    - ``gae``: :func:`generalized_advantages` of the whole reward; needs a critic.
    - ``reinforce++`` (arXiv 2501.03262): return-to-go of the whole reward, without a baseline; meant to be whitened.
    - ``rloo`` (arXiv 2402.14740), undiscounted in :math:`s`, as a response is one action:

      .. math::
          A_{i,t} = s_i - \operatorname*{mean}_{j \ne i} s_j
                    + G_{i,t} - \operatorname*{mean}_{j \ne i,\ t \in y_j} G_{j,t}

    - ``grpo`` (arXiv 2402.03300): the same with the mean of :math:`s` over the whole group, all divided by one number
      for both terms, so that :math:`\beta_1` and :math:`\beta_3` stay in one unit: the sample standard deviation of the
      group's total rewards or, if that is larger, the root mean square of its dense term, plus 1e-4. (By the deviation
      alone a group whose totals are nearly equal, though its tokens' rewards are not, would have huge advantages.)

    Without dense terms the last two are those of their papers.

    Args:
        estimator: ``"gae"``, ``"reinforce++"``, ``"rloo"`` or ``"grpo"``.
        terms: The reward, each term ``(B, T)``. ``score`` is the sentence term, ``token`` and ``kl`` are the dense one.
        mask: Boolean, one unbroken run of True a row; shape ``(B, T)``. Positions are counted by column, so the
            responses of a group start in the same one.
        gamma: Discount.
        lam: :math:`\lambda` of ``gae``; the others do not read it.
        values: Value of the state before each token, shape ``(B, T)``; read by ``gae`` only.
        group_size: Responses to each prompt, in neighbouring rows; read by ``rloo`` and ``grpo`` only.

    Returns:
        Advantages and returns, each ``(B, T)`` and zero outside the mask. Returns are the critic's targets for ``gae``
        and the return-to-go of the whole reward for the others.

    Raises:
        ValueError: If the estimator is unknown, ``gae`` lacks its values, or a group estimator gets a group size that
            is below 2 or does not divide ``B``.

    Example:
        >>> zeros, mask = torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool)
        >>> terms = RewardTerms(token=zeros, kl=zeros, score=torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
        >>> estimate_advantages("rloo", terms, mask, gamma=1.0, lam=1.0, group_size=2)[0]
        tensor([[ 1.,  1.],
                [-1., -1.]])
    """
    if estimator == "gae":
        if values is None:
            raise ValueError("estimator gae needs values; give them, or choose an estimator without a critic")
        return generalized_advantages(terms.total, values, mask, gamma, lam)
    returns = return_to_go(terms.total, mask, gamma)
    if estimator == "reinforce++":
        return returns, returns
    if estimator not in GROUP_ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}; choose gae, reinforce++, rloo or grpo")

    rows = mask.shape[0]
    if group_size < 2 or rows % group_size:
        raise ValueError(
            f"estimator {estimator} compares 2 or more responses to a prompt, but {rows} responses came in groups of "
            f"{group_size}; give a group_size of at least 2 that divides them"
        )
    scores = masked_sum(terms.score, mask, dim=1).view(-1, group_size)
    deviations = scores - scores.mean(dim=1, keepdim=True)
    dense = _minus_others_still_running(return_to_go(terms.token + terms.kl, mask, gamma), mask, group_size)
    if estimator == "rloo":
        # s_i less the mean of the other n - 1 is the deviation from the mean of all n, stretched by n / (n - 1).
        sentence = deviations * (group_size / (group_size - 1))
        return zero_outside(sentence.view(-1, 1) + dense, mask), returns
    totals = masked_sum(terms.total, mask, dim=1).view(-1, group_size)
    groups = (-1, group_size * mask.shape[1])
    dense_size = masked_mean(dense.square().view(groups), mask.reshape(groups), dim=1).sqrt()
    scale = (torch.maximum(totals.std(dim=1), dense_size) + 1e-4).repeat_interleave(group_size)[:, None]
    return zero_outside((deviations.view(-1, 1) + dense) / scale, mask), returns


def _minus_others_still_running(x: Tensor, mask: Tensor, group_size: int) -> Tensor:
    """Less the mean, at the same position, of the other responses of the group that have a token there, or of 0."""
    grouped, running = (y.reshape(-1, group_size, mask.shape[1]) for y in (x, mask))
    others = grouped.sum(dim=1, keepdim=True) - grouped
    count = running.sum(dim=1, keepdim=True) - running.long()
    return (grouped - others / count.clamp(min=1)).reshape(x.shape)
