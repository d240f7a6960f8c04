"""Sampling whose result depends on a seed per sample, not on how the samples are batched."""

import torch
from torch import Tensor
from transformers import LogitsProcessor

from rto_lightning.seeding import derive_seed


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


class SeededSampling(LogitsProcessor):
    """Draw from softmax(logits / temperature) with one uniform number for each sample and step.

    The token is where the cumulative distribution passes the number (inverse transform sampling), so a sample depends
    on its own seed and logits alone. All other logits become -inf, so that greedy search takes the drawn token.

    Args:
        seeds: one for each row of the batch.
        max_new_tokens: steps for which numbers are drawn.
        temperature: divides the logits.
    """

    def __init__(self, seeds: list[int], max_new_tokens: int, temperature: float) -> None:
        self.uniforms = torch.stack(
            [torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
        )
        self.temperature = temperature
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Replace the logits (B, V) of one step by the draw."""
        cumulative = (scores.double() / self.temperature).softmax(-1).cumsum(-1)
        self.uniforms = self.uniforms.to(scores.device)
        threshold = self.uniforms[:, self.step, None] * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, threshold, right=True).clamp(max=scores.shape[-1] - 1)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn, 0.0)
