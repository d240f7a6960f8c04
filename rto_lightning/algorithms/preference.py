"""Losses on pairs of answers that train a policy without a reward model, of the answers' log-probabilities."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class PreferenceLoss(NamedTuple):
    """Losses of a batch of pairs, and the implicit rewards behind them."""

    losses: Tensor
    """One loss a pair, shape ``(B,)``."""
    chosen_rewards: Tensor
    """What the loss takes for the reward of the chosen answers, detached, shape ``(B,)``; each loss says what it is."""
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
        Losses, and the implicit rewards :math:`\beta \log (\pi / \pi_{ref})`.

    Raises:
        ValueError: If the label smoothing is outside ``[0, 0.5)``: from a half on, the labels mean nothing or
            their opposite.

    Example:
        >>> chosen, rejected, reference = torch.tensor([-10.0]), torch.tensor([-12.0]), torch.tensor([-11.0])
        >>> loss = dpo_loss(chosen, rejected, reference, reference, beta=0.1)
        >>> loss.losses, loss.chosen_rewards, loss.rejected_rewards
        (tensor([0.5981]), tensor([0.1000]), tensor([-0.1000]))
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
        Losses, and the implicit rewards :math:`\beta \log (\pi / \pi_{ref})`.

    Example:
        >>> chosen, rejected, reference = torch.tensor([-10.0]), torch.tensor([-12.0]), torch.tensor([-11.0])
        >>> ipo_loss(chosen, rejected, reference, reference, beta=0.25).losses
        tensor([0.])
    """
    chosen_log_ratio = policy_chosen - reference_chosen
    rejected_log_ratio = policy_rejected - reference_rejected
    losses = (chosen_log_ratio - rejected_log_ratio - 1 / (2 * beta)).square()
    return PreferenceLoss(losses, beta * chosen_log_ratio.detach(), beta * rejected_log_ratio.detach())


def rdpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float,
    length_coefficient: float,
) -> PreferenceLoss:
    r"""Length-regularized DPO (R-DPO; Park et al., arXiv 2403.19159).

    .. math::
        L = -\log \sigma\bigl(\beta h + \alpha (|y_w| - |y_l|)\bigr)

    with :math:`h` as in :func:`dpo_loss`. The policy that maximizes
    :math:`r - \alpha |y| - \beta \mathrm{KL}(\pi \| \pi_{ref})` satisfies
    :math:`r = \beta \log (\pi / \pi_{ref}) + \alpha |y|` up to a constant of the prompt, which gives the sign: of a
    pair whose *longer* answer was chosen, length explains a part, and the policy has less left to learn.
    :math:`\alpha` is in units of reward a token: it stands beside :math:`\beta h` and is not multiplied by
    :math:`\beta`, and each token costs an answer :math:`\alpha / \beta` nats in the optimum.

    Args:
        policy_chosen: Log-probabilities of the chosen answers, summed over tokens, shape ``(B,)``.
        policy_rejected: The same of the rejected answers.
        reference_chosen: The same of the chosen answers under the reference, without gradient.
        reference_rejected: The same of the rejected answers.
        chosen_lengths: Number of tokens of the chosen answers, shape ``(B,)``.
        rejected_lengths: The same of the rejected answers.
        beta: Strength of the pull to the reference.
        length_coefficient: :math:`\alpha`; positive discourages length.

    Returns:
        Losses, and the implicit rewards :math:`r`.

    Example:
        >>> chosen, rejected, reference = torch.tensor([-10.0]), torch.tensor([-12.0]), torch.tensor([-11.0])
        >>> lengths = torch.tensor([20]), torch.tensor([10])
        >>> rdpo_loss(chosen, rejected, reference, reference, *lengths, beta=0.1, length_coefficient=0.05).losses
        tensor([0.4032])
    """
    # A float times an integer tensor would be rounded to the default dtype.
    chosen_lengths, rejected_lengths = chosen_lengths.to(policy_chosen), rejected_lengths.to(policy_rejected)
    chosen_rewards = beta * (policy_chosen - reference_chosen) + length_coefficient * chosen_lengths
    rejected_rewards = beta * (policy_rejected - reference_rejected) + length_coefficient * rejected_lengths
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return PreferenceLoss(losses, chosen_rewards.detach(), rejected_rewards.detach())


def simpo_loss(policy_chosen_mean: Tensor, policy_rejected_mean: Tensor, beta: float, margin: float) -> PreferenceLoss:
    r"""Simple preference optimization (SimPO; Meng et al., arXiv 2405.14734, equation 6): no reference.

    .. math::
        L = -\log \sigma\Bigl(\frac{\beta}{|y_w|} \log \pi(y_w) - \frac{\beta}{|y_l|} \log \pi(y_l) - \gamma\Bigr)

    Args:
        policy_chosen_mean: Log-probabilities of the chosen answers, averaged over tokens, shape ``(B,)``.
        policy_rejected_mean: The same of the rejected answers.
        beta: Scale of the reward; as the log-probabilities are averages, it is larger than in DPO (2 to 10).
        margin: :math:`\gamma`, by which the chosen reward shall be the higher one, in units of reward. The authors'
            code takes :math:`\gamma / \beta` instead.

    Returns:
        Losses, and the implicit rewards :math:`\beta \log \pi(y) / |y|`, which are never positive.

    Example:
        >>> simpo_loss(torch.tensor([-1.0]), torch.tensor([-2.0]), beta=2.0, margin=1.0).losses
        tensor([0.3133])
    """
    losses = -F.logsigmoid(beta * (policy_chosen_mean - policy_rejected_mean) - margin)
    return PreferenceLoss(losses, beta * policy_chosen_mean.detach(), beta * policy_rejected_mean.detach())
