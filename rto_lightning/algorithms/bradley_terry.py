"""The loss of the reward model."""

import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(chosen_scores: Tensor, rejected_scores: Tensor, margin: Tensor | None = None) -> Tensor:
    r"""Negative log-likelihood of the preferences under the model of Bradley and Terry (1952).

    .. math::
        L = -\log \sigma(r(x, y_w) - r(x, y_l) - m)

    The margin :math:`m` demands a larger difference where the preference is clear (Llama 2, arXiv 2307.09288,
    equation 2).

    Args:
        chosen_scores: Scores of the chosen answers, shape ``(B,)``.
        rejected_scores: Scores of the rejected answers, shape ``(B,)``.
        margin: Shape ``(B,)``; None is 0.

    Returns:
        One loss a pair, shape ``(B,)``.

    Raises:
        ValueError: If the shapes differ. A ``(B, 1)`` from a scalar head would pair every answer with every
            other.

    Example:
        >>> bradley_terry_loss(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 0.0]))
        tensor([0.6931, 0.1269])
    """
    if margin is None:
        margin = chosen_scores.new_zeros(chosen_scores.shape)
    if not chosen_scores.shape == rejected_scores.shape == margin.shape:
        raise ValueError(
            f"scores and margin must have one shape, but have {tuple(chosen_scores.shape)} (chosen), "
            f"{tuple(rejected_scores.shape)} (rejected) and {tuple(margin.shape)} (margin)"
        )
    return -F.logsigmoid(chosen_scores - rejected_scores - margin)
