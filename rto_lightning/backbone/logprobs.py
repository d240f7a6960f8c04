"""Log-probabilities of given tokens without ever holding the logits of a whole batch."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def gather_logprobs(
    hidden: Tensor,
    output_layer: nn.Module,
    tokens: Tensor,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each token under the softmax over the vocabulary, a chunk of tokens at a time.

        log pi(y_i) = z_i[y_i] / temperature - logsumexp(z_i / temperature),    z_i = output_layer(h_i)

    The softmax is computed in float32; the logits are as exact as the output layer makes them (bfloat16 ones are off by
    about 0.02). They exist for `chunk_tokens` rows only; with gradients on and more rows than that, they are computed
    again in the backward pass.

    Args:
        hidden: last hidden states of the positions *before* the tokens, (N, H).
        output_layer: maps (N, H) to logits (N, V).
        tokens: the tokens whose log-probability is asked, (N,) int64.
        temperature: divides the logits; in nats as everything here.
        chunk_tokens: rows whose logits exist at a time.
        with_entropy: also return the entropy of each distribution.

    Returns:
        Log-probabilities (N,), and entropies (N,) or None; float32 (float64 if the logits are).
    """
    recompute = torch.is_grad_enabled() and hidden.shape[0] > chunk_tokens
    logprobs, entropies = [], []
    # A frozen output layer is many times slower on a slice that is not contiguous.
    for rows, targets in zip(hidden.contiguous().split(chunk_tokens), tokens.split(chunk_tokens), strict=True):
        arguments = (rows, output_layer, targets, temperature, with_entropy)
        if recompute:
            chunk_logprobs, chunk_entropy = checkpoint(_gather_chunk, *arguments, use_reentrant=False)
        else:
            chunk_logprobs, chunk_entropy = _gather_chunk(*arguments)
        logprobs.append(chunk_logprobs)
        entropies.append(chunk_entropy)
    return torch.cat(logprobs), torch.cat(entropies) if with_entropy else None


def _gather_chunk(
    hidden: Tensor,
    output_layer: nn.Module,
    tokens: Tensor,
    temperature: float,
    with_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    logits = output_layer(hidden)
    if logits.dtype != torch.float64:
        logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    normalizer = logits.logsumexp(-1)
    logprobs = logits.gather(-1, tokens[:, None]).squeeze(-1) - normalizer
    if not with_entropy:
        return logprobs, None
    probabilities = (logits - normalizer[:, None]).exp()
    return logprobs, normalizer - (probabilities * logits).sum(-1)
