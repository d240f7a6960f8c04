"""Sums, means and positions under a response mask.

Masking is done by selection, never by multiplication: ``nan * 0`` is ``nan``. Selecting *before* any further
operation also keeps the gradients of the masked positions at zero.
"""

import torch
from torch import Tensor


def zero_outside(x: Tensor, mask: Tensor) -> Tensor:
    """Copy of ``x`` with zeros where ``mask`` is False, whatever ``x`` holds there.

    Args:
        x: Any values, shape ``(B, T)``.
        mask: Boolean, shape ``(B, T)``.

    Returns:
        Shape ``(B, T)``, dtype of ``x``.

    Example:
        >>> zero_outside(torch.tensor([[1.0, float("nan")]]), torch.tensor([[True, False]]))
        tensor([[1., 0.]])
    """
    return torch.where(mask, x, 0)


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of ``x`` over the True positions of ``mask``.

    Args:
        x: Any values, shape ``(B, T)``.
        mask: Boolean, shape ``(B, T)``.
        dim: Dimension to sum over; None sums over all.

    Returns:
        A scalar, or the shape of ``x`` without ``dim``.

    Example:
        >>> mask = torch.tensor([[True, True, False], [True, False, False]])
        >>> masked_sum(torch.tensor([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0]]), mask, dim=1)
        tensor([3., 4.])
    """
    return zero_outside(x, mask).sum(dim=dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of ``x`` over the True positions of ``mask``; 0 where there are none.

    Args:
        x: Floating point values, shape ``(B, T)``.
        mask: Boolean, shape ``(B, T)``.
        dim: Dimension to average over; None averages over all positions at once, so that every token weighs
            the same.

    Returns:
        A scalar, or the shape of ``x`` without ``dim``.

    Example:
        >>> mask = torch.tensor([[True, True, False], [True, False, False]])
        >>> x = torch.tensor([[1.0, 2.0, 9.0], [6.0, 9.0, 9.0]])
        >>> masked_mean(x, mask), masked_mean(x, mask, dim=1)
        (tensor(3.), tensor([1.5000, 6.0000]))
    """
    return masked_sum(x, mask, dim) / mask.sum(dim=dim).clamp(min=1)


def response_mask_from_lengths(lengths: Tensor, width: int) -> Tensor:
    """Mask of right-padded responses.

    Lengths, and never ``token == pad``, say what is response: many tokenizers pad with a stop token.

    Args:
        lengths: Number of tokens of each response, the stop token included; int64, shape ``(B,)``, from 0 to
            ``width``.
        width: ``T``.

    Returns:
        Boolean, shape ``(B, T)``.

    Example:
        >>> response_mask_from_lengths(torch.tensor([2, 0]), width=3)
        tensor([[ True,  True, False],
                [False, False, False]])
    """
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def last_token_index(mask: Tensor) -> Tensor:
    """Position of the last True of each row.

    Args:
        mask: Boolean, shape ``(B, T)``.

    Returns:
        int64, shape ``(B,)``; -1 for a row that has no True.

    Example:
        >>> last_token_index(torch.tensor([[True, True, False], [False, False, False]]))
        tensor([ 1, -1])
    """
    positions = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, positions, -1).amax(dim=1)


def place_at_last_token(scores: Tensor, mask: Tensor) -> Tensor:
    """Sentence-level scores as token-level values: all on the last token of each response.

    Args:
        scores: One score a response, shape ``(B,)``.
        mask: Boolean, shape ``(B, T)``.

    Returns:
        Shape ``(B, T)``, dtype of ``scores``; a row without tokens is all zero.

    Raises:
        ValueError: If ``scores`` is not of shape ``(B,)``. A ``(B, 1)`` from a scalar head would broadcast
            silently.

    Example:
        >>> place_at_last_token(torch.tensor([5.0, 7.0]), response_mask_from_lengths(torch.tensor([2, 3]), width=3))
        tensor([[0., 5., 0.],
                [0., 0., 7.]])
    """
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"scores must have shape {tuple(mask.shape[:1])}, one a response, not {tuple(scores.shape)}")
    positions = torch.arange(mask.shape[1], device=mask.device)
    return zero_outside(scores[:, None], positions == last_token_index(mask)[:, None])
