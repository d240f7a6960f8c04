"""Losses on pairs of answers that train a policy without a reward model."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class PreferenceLoss(NamedTuple):
    """Losses of a batch of pairs, and the implicit rewards behind them."""

    losses: Tensor
    """One loss a pair, shape ``(B,)``."""
    chosen_rewards: Tensor
    r"""Detached :math:`\beta \log (\pi / \pi_{ref})` of the chosen answers, shape ``(B,)``."""
    rejected_rewards: Tensor
    """The same of the rejected answers, shape ``(B,)``."""


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    r"""Direct preference optimization (Rafailov et al., arXiv 2305.18290, equation 7).

    .. math::
        L = -(1 - \epsilon) \log \sigma(\beta h) - \epsilon \log \sigma(-\beta h), \qquad
        h = \log \frac{\pi(y_w)}{\pi_{ref}(y_w)} - \log \frac{\pi(y_l)}{\pi_{ref}(y_l)}

    with :math:`\epsilon = 0`. A positive :math:`\epsilon` is conservative DPO (E. Mitchell, "A note on DPO
    with noisy preferences & relationship to IPO", 2023): it supposes that this share of the labels is
    flipped.

    Args:
        policy_chosen: Log-probabilities of the chosen answers, summed over tokens, shape ``(B,)``.
        policy_rejected: The same of the rejected answers.
        reference_chosen: The same of the chosen answers under the reference, without gradient.
        reference_rejected: The same of the rejected answers.
        beta: Strength of the pull to the reference.
        label_smoothing: :math:`\epsilon`.

    Returns:
        Losses and implicit rewards.

    Raises:
        ValueError: If the label smoothing is outside ``[0, 0.5)``: from a half on, the labels mean nothing or
            their opposite.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be at least 0 and below 0.5, but is {label_smoothing}")
    chosen_log_ratio = policy_chosen - reference_chosen
    rejected_log_ratio = policy_rejected - reference_rejected
    logits = beta * (chosen_log_ratio - rejected_log_ratio)
    losses = -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)
    return PreferenceLoss(losses, beta * chosen_log_ratio.detach(), beta * rejected_log_ratio.detach())


def ipo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
) -> PreferenceLoss:
    r"""Identity preference optimization (Azar et al., arXiv 2310.12036, equation 17).

    .. math::
        L = \Bigl(h - \frac{1}{2 \beta}\Bigr)^2

    with :math:`h` as in :func:`dpo_loss` and :math:`\beta` the paper's :math:`\tau`. As in the paper
    :math:`h` is made of summed log-probabilities; some libraries average over the tokens instead.

    Args:
        policy_chosen: Log-probabilities of the chosen answers, summed over tokens, shape ``(B,)``.
        policy_rejected: The same of the rejected answers.
        reference_chosen: The same of the chosen answers under the reference, without gradient.
        reference_rejected: The same of the rejected answers.
        beta: Strength of the pull to the reference.

    Returns:
        Losses and implicit rewards.
    """
    chosen_log_ratio = policy_chosen - reference_chosen
    rejected_log_ratio = policy_rejected - reference_rejected
    losses = (chosen_log_ratio - rejected_log_ratio - 1 / (2 * beta)).square()
    return PreferenceLoss(losses, beta * chosen_log_ratio.detach(), beta * rejected_log_ratio.detach())
