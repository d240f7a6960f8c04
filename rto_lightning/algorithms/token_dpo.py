"""Token-level DPO: preference losses that also weigh how far the policy went from its reference at each token.

Beside the log-probabilities of the answers they need the sequential KL divergence of each answer, the sum over its
positions of the divergence of the two distributions of the next token,

    D(y) = sum_t KL(pi_ref(. | x, y_<t) || pi(. | x, y_<t)),

whose expectation is over the whole vocabulary and under the *reference*.
"""

import torch.nn.functional as F
from torch import Tensor

from rto_lightning.algorithms.preference import PreferenceLoss


def tdpo1_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    chosen_kl: Tensor,
    rejected_kl: Tensor,
    beta: float,
) -> PreferenceLoss:
    r"""The first loss of token-level DPO (TDPO; Zeng et al., arXiv 2404.11999), from its Bradley-Terry model.

    .. math::
        L = -\log \sigma\bigl(\beta h - \beta (D(y_l) - D(y_w))\bigr)

    with :math:`h` as in :func:`dpo_loss`. Both divergences carry gradient: that of the chosen answer is driven up.

    Args:
        policy_chosen: Log-probabilities of the chosen answers, summed over tokens, shape ``(B,)``.
        policy_rejected: The same of the rejected answers.
        reference_chosen: The same of the chosen answers under the reference, without gradient.
        reference_rejected: The same of the rejected answers.
        chosen_kl: :math:`D(y_w)` in nats, with gradient, shape ``(B,)``.
        rejected_kl: :math:`D(y_l)`, the same of the rejected answers.
        beta: Strength of the pull to the reference.

    Returns:
        Losses, and the implicit rewards :math:`\beta (\log (\pi / \pi_{ref}) + D)`.

    Example:
        >>> chosen, rejected, reference = torch.tensor([-10.0]), torch.tensor([-12.0]), torch.tensor([-11.0])
        >>> divergences = torch.tensor([0.5]), torch.tensor([2.0])
        >>> tdpo1_loss(chosen, rejected, reference, reference, *divergences, beta=0.1).losses
        tensor([0.6685])
    """
    chosen_rewards = beta * (policy_chosen - reference_chosen + chosen_kl)
    rejected_rewards = beta * (policy_rejected - reference_rejected + rejected_kl)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return PreferenceLoss(losses, chosen_rewards.detach(), rejected_rewards.detach())


def tdpo2_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    chosen_kl: Tensor,
    rejected_kl: Tensor,
    beta: float,
    kl_coefficient: float,
) -> PreferenceLoss:
    r"""The second loss of token-level DPO, which its authors recommend (arXiv 2404.11999).

    .. math::
        L = -\log \sigma\bigl(\beta h - \alpha \beta (D(y_l) - \mathrm{sg}(D(y_w)))\bigr)

    with :math:`h` as in :func:`dpo_loss`. It differs from :func:`tdpo1_loss` by the weight :math:`\alpha` and by
    :math:`\mathrm{sg}`: the divergence on the chosen answer is a baseline and carries no gradient, so that the loss
    holds back the divergence on rejected answers and never asks for more of it on chosen ones.

    Args:
        policy_chosen: Log-probabilities of the chosen answers, summed over tokens, shape ``(B,)``.
        policy_rejected: The same of the rejected answers.
        reference_chosen: The same of the chosen answers under the reference, without gradient.
        reference_rejected: The same of the rejected answers.
        chosen_kl: :math:`D(y_w)` in nats, shape ``(B,)``; detached here.
        rejected_kl: :math:`D(y_l)`, the same of the rejected answers, with gradient.
        beta: Strength of the pull to the reference.
        kl_coefficient: :math:`\alpha`.

    Returns:
        Losses, and the implicit rewards :math:`\beta (\log (\pi / \pi_{ref}) + D)`, which are those of
        :func:`tdpo1_loss` whatever :math:`\alpha`.

    Example:
        >>> chosen, rejected, reference = torch.tensor([-10.0]), torch.tensor([-12.0]), torch.tensor([-11.0])
        >>> divergences = torch.tensor([0.5]), torch.tensor([2.0])
        >>> tdpo2_loss(chosen, rejected, reference, reference, *divergences, beta=0.1, kl_coefficient=0.5).losses
        tensor([0.6326])
    """
    chosen_log_ratio = policy_chosen - reference_chosen
    rejected_log_ratio = policy_rejected - reference_rejected
    logits = chosen_log_ratio - rejected_log_ratio - kl_coefficient * (rejected_kl - chosen_kl.detach())
    chosen_rewards = beta * (chosen_log_ratio + chosen_kl)
    rejected_rewards = beta * (rejected_log_ratio + rejected_kl)
    return PreferenceLoss(-F.logsigmoid(beta * logits), chosen_rewards.detach(), rejected_rewards.detach())
