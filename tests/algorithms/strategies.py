"""Random batches for the property tests."""

from dataclasses import dataclass, field

import hypothesis.strategies as st
import torch
from torch import Tensor

from rto_lightning.algorithms import response_mask_from_lengths

GARBAGE = (float("nan"), float("inf"), float("-inf"), 1e30)
"""What may lie outside a mask."""


@dataclass(frozen=True)
class Batch:
    """A response mask and a source of values for it."""

    lengths: list[int]
    width: int
    garbage: float
    seed: int
    mask: Tensor = field(init=False, repr=False)
    generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", response_mask_from_lengths(torch.tensor(self.lengths), self.width))
        object.__setattr__(self, "generator", torch.Generator().manual_seed(self.seed))

    def normal(self) -> Tensor:
        """Fresh values, ``(B, T)`` in float64."""
        return torch.randn(self.mask.shape, dtype=torch.float64, generator=self.generator)

    def logprobs(self) -> Tensor:
        """Fresh log-probabilities, ``(B, T)`` in float64."""
        return -self.normal().abs()

    def scores(self) -> Tensor:
        """One fresh value a response, ``(B,)`` in float64."""
        return torch.randn(len(self.mask), dtype=torch.float64, generator=self.generator)

    def spoil(self, x: Tensor) -> Tensor:
        """``x`` with garbage outside the mask."""
        return torch.where(self.mask, x, self.garbage)


@st.composite
def batches(draw: st.DrawFn, min_length: int = 0, min_padding: int = 0) -> Batch:
    """Right-padded batches of 1 to 4 responses with at least one token in all."""
    width = draw(st.integers(1 + min_padding, 6))
    longest = width - min_padding
    lengths = [draw(st.integers(1, longest)), *draw(st.lists(st.integers(min_length, longest), max_size=3))]
    return Batch(
        lengths=draw(st.permutations(lengths)),
        width=width,
        garbage=draw(st.sampled_from(GARBAGE)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
