"""Log-probabilities of given tokens without ever holding the logits of a whole batch."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
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
    about 0.02). They exist for `chunk_tokens` rows only. If the output layer is linear and frozen, the gradient with
    respect to each row is found in the same go and only that is kept for the backward pass; otherwise the logits of
    more rows than a chunk are computed again there.

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
    hidden = hidden.contiguous()  # a frozen output layer is many times slower on a slice that is not contiguous
    layer_is_frozen = not any(weight.requires_grad for weight in output_layer.parameters())
    if not torch.is_grad_enabled() or (layer_is_frozen and not hidden.requires_grad):
        return _gather_without_gradients(hidden, output_layer, tokens, temperature, chunk_tokens, with_entropy)
    if layer_is_frozen and type(output_layer) is nn.Linear:
        gathered = _GatherThroughFrozenLayer.apply(  # type: ignore[no-untyped-call]  # torch leaves it without annotations
            hidden, output_layer, tokens, temperature, chunk_tokens, with_entropy
        )
        return gathered if with_entropy else (gathered, None)
    return _gather_by_autograd(hidden, output_layer, tokens, temperature, chunk_tokens, with_entropy)


class _Chunk:
    """Softmax of a chunk of logits, whose memory it takes over.

    Args:
        logits: (n, V), changed in place if float32 or float64.
        tokens: (n,) int64.
        temperature: divides the logits.
        with_entropy: also find the entropy.
    """

    def __init__(self, logits: Tensor, tokens: Tensor, temperature: float, with_entropy: bool) -> None:
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if temperature != 1.0:
            logits.div_(temperature)
        # Relative to the largest, so that no exponential overflows.
        logits.sub_(logits.amax(-1, keepdim=True))
        chosen = logits.gather(-1, tokens[:, None]).squeeze(-1)
        self.centred = logits.clone() if with_entropy else None
        self.probabilities = logits.exp_()
        total = self.probabilities.sum(-1)
        self.probabilities.div_(total[:, None])
        self.logprobs = chosen - total.log()
        self.entropy: Tensor | None = None
        if self.centred is not None:
            self.mean = torch.linalg.vecdot(self.probabilities, self.centred)
            self.entropy = total.log() - self.mean


@torch.no_grad()
def _gather_without_gradients(
    hidden: Tensor, output_layer: nn.Module, tokens: Tensor, temperature: float, chunk_tokens: int, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    logprobs, entropies = [], []
    for rows, targets in zip(hidden.split(chunk_tokens), tokens.split(chunk_tokens), strict=True):
        chunk = _Chunk(output_layer(rows), targets, temperature, with_entropy)
        logprobs.append(chunk.logprobs)
        entropies.append(chunk.entropy)
    return torch.cat(logprobs), torch.cat(entropies) if with_entropy else None  # type: ignore[arg-type]


class _GatherThroughFrozenLayer(torch.autograd.Function):
    """Log-probabilities and entropies of rows, of which each depends on its own hidden state alone.

    d log pi(y) / dh = (onehot(y) - p) W / temperature
    d entropy / dh   = -p (log p + entropy) W / temperature
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        layer: nn.Linear,
        tokens: Tensor,
        temperature: float,
        chunk_tokens: int,
        with_entropy: bool,
    ) -> Any:
        logprobs, entropies, gradients, entropy_gradients = [], [], [], []
        for rows, targets in zip(hidden.split(chunk_tokens), tokens.split(chunk_tokens), strict=True):
            chunk = _Chunk(layer(rows), targets, temperature, with_entropy)
            logprobs.append(chunk.logprobs)
            probabilities = chunk.probabilities
            if chunk.entropy is not None and chunk.centred is not None:
                entropies.append(chunk.entropy)
                # log p + entropy is a logit less the mean of the logits.
                slope = chunk.centred.sub_(chunk.mean[:, None]).mul_(probabilities)
                entropy_gradients.append(_through(slope, layer).div_(-temperature))
            slope = probabilities.scatter_add_(1, targets[:, None], -torch.ones_like(chunk.logprobs)[:, None])
            gradients.append(_through(slope, layer).div_(-temperature))
        ctx.save_for_backward(torch.cat(gradients), *([torch.cat(entropy_gradients)] if with_entropy else []))
        return (torch.cat(logprobs), torch.cat(entropies)) if with_entropy else torch.cat(logprobs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        rows = zip(upstream, ctx.saved_tensors, strict=True)
        gradient = sum((scale[:, None] * of_row).to(of_row.dtype) for scale, of_row in rows)
        return gradient, None, None, None, None, None


def _through(slope: Tensor, layer: nn.Linear) -> Tensor:
    """A gradient with respect to logits (n, V) as one with respect to hidden states (n, H)."""
    return slope.to(layer.weight.dtype) @ layer.weight


def _gather_by_autograd(
    hidden: Tensor, output_layer: nn.Module, tokens: Tensor, temperature: float, chunk_tokens: int, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    recompute = hidden.shape[0] > chunk_tokens
    logprobs, entropies = [], []
    for rows, targets in zip(hidden.split(chunk_tokens), tokens.split(chunk_tokens), strict=True):
        arguments = (rows, output_layer, targets, temperature, with_entropy)
        if recompute:
            chunk_logprobs, chunk_entropy = checkpoint(_differentiable_chunk, *arguments, use_reentrant=False)
        else:
            chunk_logprobs, chunk_entropy = _differentiable_chunk(*arguments)
        logprobs.append(chunk_logprobs)
        entropies.append(chunk_entropy)
    return torch.cat(logprobs), torch.cat(entropies) if with_entropy else None


def _differentiable_chunk(
    hidden: Tensor,
    output_layer: nn.Module,
    tokens: Tensor,
    temperature: float,
    with_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """As :class:`_Chunk`, to the last bit, with a graph for autograd."""
    logits = output_layer(hidden)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    centred = logits - logits.detach().amax(-1, keepdim=True)
    exponentials = centred.exp()
    total = exponentials.sum(-1)
    logprobs = centred.gather(-1, tokens[:, None]).squeeze(-1) - total.log()
    if not with_entropy:
        return logprobs, None
    return logprobs, total.log() - torch.linalg.vecdot(exponentials / total[:, None], centred)
