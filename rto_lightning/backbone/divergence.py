"""How far one role went from another at each token, without ever holding the logits of a whole batch."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

OutputLayer = Callable[[Tensor], Tensor]
"""Maps hidden states (N, H) to logits (N, V)."""


class TokenDivergence(NamedTuple):
    """Two roles compared at the same positions; float32 (float64 if the logits are)."""

    logprobs: Tensor
    """Log-probability of each token under the role, in nats, with its gradient."""
    reference_logprobs: Tensor
    """The same under the reference, without gradient."""
    kl: Tensor
    """KL(reference || role) of the distributions of the token over the whole vocabulary, in nats, with the gradient of
    the role."""


def gather_divergence(
    hidden: Tensor,
    reference_hidden: Tensor,
    output_layer: OutputLayer,
    reference_output_layer: OutputLayer,
    tokens: Tensor,
    chunk_tokens: int = 1024,
) -> TokenDivergence:
    """Log-probabilities of given tokens under two roles, and the KL divergence between their next-token distributions.

        KL_i = sum_v p_ref(v) (log p_ref(v) - log p(v)),    v over the vocabulary, at temperature 1

    Logits exist for `chunk_tokens` rows of each role only; with gradients on and more rows than that, both are computed
    again in the backward pass. The output layers are then called during backward, and have to compute as their own
    role whoever is active at that time.

    Args:
        hidden: the role's last hidden states of the positions *before* the tokens, (N, H).
        reference_hidden: the same of the reference; gets no gradient.
        output_layer: the role's.
        reference_output_layer: the reference's.
        tokens: the tokens whose log-probability is asked, (N,) int64.
        chunk_tokens: rows whose logits exist at a time.

    Returns:
        Three tensors (N,).
    """
    recompute = torch.is_grad_enabled() and hidden.shape[0] > chunk_tokens
    chunks = []
    # A frozen output layer is many times slower on a slice that is not contiguous.
    rows_of_both = (x.contiguous().split(chunk_tokens) for x in (hidden, reference_hidden, tokens))
    for rows, reference_rows, targets in zip(*rows_of_both, strict=True):
        arguments = (rows, reference_rows, output_layer, reference_output_layer, targets)
        if recompute:
            chunks.append(checkpoint(_divergence_of_chunk, *arguments, use_reentrant=False))
        else:
            chunks.append(_divergence_of_chunk(*arguments))
    return TokenDivergence(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def _divergence_of_chunk(
    hidden: Tensor,
    reference_hidden: Tensor,
    output_layer: OutputLayer,
    reference_output_layer: OutputLayer,
    tokens: Tensor,
) -> TokenDivergence:
    with torch.no_grad():
        reference = _log_softmax(reference_output_layer(reference_hidden))
    logprobs = _log_softmax(output_layer(hidden))
    # Logarithms come from log_softmax: of a probability that rounds to 0, log(p) would be -inf and 0 * -inf is nan.
    kl = (reference.exp() * (reference - logprobs)).sum(-1)
    chosen, reference_chosen = (x.gather(-1, tokens[:, None]).squeeze(-1) for x in (logprobs, reference))
    return TokenDivergence(chosen, reference_chosen, kl)


def _log_softmax(logits: Tensor) -> Tensor:
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
