"""Sampling whose result depends on a seed per sample, not on how the samples are batched."""

import torch
from torch import Tensor

from rto_lightning.backbone import Draw
from rto_lightning.seeding import derive_seed

SAMPLED_LOGITS = 2**22
"""Logits that are held in float64 at a time (32 MiB for each copy); a large batch is drawn in several parts."""


def sample_seeds(seed: int, iteration: int, index: Tensor) -> list[int]:
    """A 63-bit seed for each sample, from the run's seed, the iteration and the prompt's row in the data set.

    Args:
        seed: seed of the run.
        iteration: PPO iteration; negative numbers are free for validation.
        index: row of each prompt, (B,) int64. A row that occurs several times gets a seed for each occurrence.
    """
    occurrences: dict[int, int] = {}
    seeds = []
    for row in index.tolist():
        occurrence = occurrences[row] = occurrences.get(row, -1) + 1
        seeds.append(derive_seed(seed, iteration, row, occurrence))
    return seeds


class SeededSampling:
    """Draw from softmax(logits / temperature) with one uniform number for each response and step.

    A response depends on its own seed and logits alone, whatever stands beside it in the batch.

    Args:
        seeds: one for each of B responses.
        max_new_tokens: steps for which numbers are drawn.
        temperature: divides the logits; at 0 the token with the highest logit is taken.
        with_logprobs: also return log-probabilities and entropies; see :func:`draw_tokens`.
    """

    def __init__(self, seeds: list[int], max_new_tokens: int, temperature: float, with_logprobs: bool = False) -> None:
        self.uniforms = torch.stack(
            [torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
        )
        self.temperature = temperature
        self.with_logprobs = with_logprobs

    def __call__(self, logits: Tensor, rows: Tensor, step: int) -> Draw:
        """Tokens of one step for the responses `rows` (N,) int64, from their logits (N, V)."""
        self.uniforms = self.uniforms.to(logits.device)
        uniforms = self.uniforms[rows, step]
        size = max(1, SAMPLED_LOGITS // logits.shape[1])
        parts = [
            draw_tokens(part, numbers, self.temperature, self.with_logprobs)
            for part, numbers in zip(logits.split(size), uniforms.split(size), strict=True)
        ]
        tokens, *read = zip(*parts, strict=True)
        return Draw(torch.cat(tokens), *(None if column[0] is None else torch.cat(column) for column in read))


def draw_tokens(logits: Tensor, uniforms: Tensor, temperature: float, with_logprobs: bool = False) -> Draw:
    """Inverse transform sampling: the token where the cumulative distribution passes a uniform number.

        y = min { v : F(v) > u },    F(v) = sum_{w <= v} p(w),    p = softmax(logits / temperature)

    Computed in float64, so that rounding practically never decides a draw.

    Args:
        logits: (N, V).
        uniforms: (N,) float64 in [0, 1).
        temperature: divides the logits; at 0 the token with the highest logit is taken.
        with_logprobs: also return log p(y) and the entropy of p; with p = softmax(logits) at temperature 0.

    Returns:
        Tokens (N,) int64; log-probabilities and entropies (N,) in nats, float32 (float64 if the logits are), or None.
    """
    if temperature == 0 and not with_logprobs:
        return Draw(logits.argmax(-1))
    probabilities = (logits.double() / (temperature or 1.0)).softmax(-1)
    tokens = logits.argmax(-1) if temperature == 0 else _token_at(probabilities.cumsum(-1), uniforms)
    if not with_logprobs:
        return Draw(tokens)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logprobs = probabilities.gather(-1, tokens[:, None]).squeeze(-1).log()
    return Draw(tokens, logprobs.to(dtype), torch.special.entr(probabilities).sum(-1).to(dtype))


def _token_at(cumulative: Tensor, uniforms: Tensor) -> Tensor:
    """First token (N,) whose cumulative probability (N, V) is above the number (N,) times the whole."""
    whole = cumulative[:, -1:]
    # Rounding may lift the product to the whole, where only tokens of probability zero are left.
    threshold = torch.minimum(uniforms[:, None] * whole, whole.nextafter(torch.zeros_like(whole)))
    # Logits that are nan give an index beyond the end.
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp(max=cumulative.shape[-1] - 1)
