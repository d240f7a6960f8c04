"""Prompts and responses in one rectangle: prompts padded on the left, responses on the right.

    [pad pad p p p | r r r pad]
     <-- P wide -->  <- T wide ->

All responses of a batch start in the same column, so `[:, P:]` is the response of every row. Which of its
positions count is told by `response_mask`, made from lengths; a token's id says nothing, since the padding id
is often the stop id too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """A batch of prompts with their responses."""

    input_ids: Tensor
    """(B, P + T) int64. Padding on both outer sides."""
    attention_mask: Tensor
    """(B, P + T) int64: 1 on tokens of prompt and response, 0 on padding."""
    response_mask: Tensor
    """(B, T) bool: true on the response's tokens, its stop token included."""

    @property
    def response_width(self) -> int:
        """T, the number of columns that hold responses."""
        return self.response_mask.shape[1]

    @property
    def prompt_width(self) -> int:
        """P, the number of columns that hold prompts."""
        return self.input_ids.shape[1] - self.response_width

    @property
    def response_ids(self) -> Tensor:
        """(B, T) int64; valid where `response_mask` is true."""
        return self.input_ids[:, self.prompt_width :]

    @property
    def response_lengths(self) -> Tensor:
        """(B,) int64: the number of tokens of each response."""
        return self.response_mask.sum(dim=1)

    @property
    def prompt_lengths(self) -> Tensor:
        """(B,) int64: the number of tokens of each prompt."""
        return self.attention_mask[:, : self.prompt_width].sum(dim=1)

    def left_aligned(self) -> Tensor:
        """(B, W) int64: each prompt and its response from column 0 on, W the longest of both together.

        What follows the end of a row is padding with arbitrary ids. A causal model reads these rows without an
        attention mask and with its own positions 0, 1, ...: nothing attends to what comes later.
        """
        width = int(self.attention_mask.sum(dim=1).max())
        columns = torch.arange(width, device=self.input_ids.device) + (self.prompt_width - self.prompt_lengths)[:, None]
        return self.input_ids.gather(1, columns.clamp(max=self.input_ids.shape[1] - 1))

    def to(self, device: torch.device | str | int) -> "Sequences":
        """The same batch on another device."""
        return Sequences(self.input_ids.to(device), self.attention_mask.to(device), self.response_mask.to(device))

    def rows(self, index: Tensor | slice | Sequence[int]) -> "Sequences":
        """The rows that `index` selects, at the same widths.

        Args:
            index: (N,) int64 positions, (B,) bool mask, list of positions, or slice.
        """
        if not isinstance(index, Tensor | slice):
            index = torch.tensor(list(index), dtype=torch.int64, device=self.input_ids.device)
        return Sequences(self.input_ids[index], self.attention_mask[index], self.response_mask[index])

    @classmethod
    def from_lists(
        cls, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int
    ) -> "Sequences":
        """Pads lists of token ids to the longest prompt and the longest response.

        Args:
            prompts: B lists of ids.
            responses: B lists of ids, row for row with the prompts.
            pad_id: Fills the padding. It may be an id that also occurs in the text.

        Raises:
            ValueError: If the two lists differ in length.
        """
        prompt_ids, prompt_mask = pad_left(prompts, pad_id)
        response_ids, response_mask = pad_right(responses, pad_id)
        if len(prompt_ids) != len(response_ids):
            raise ValueError(f"{len(prompt_ids)} prompts do not pair with {len(response_ids)} responses")
        return cls(
            torch.cat([prompt_ids, response_ids], dim=1),
            torch.cat([prompt_mask, response_mask], dim=1).long(),
            response_mask,
        )


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Pads lists of ids on the left: (B, longest) int64 ids and a bool mask, true on the given ids."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    width = int(lengths.max()) if len(rows) else 0
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows], dtype=torch.int64)
    return ids.reshape(len(rows), width), torch.arange(width) >= width - lengths[:, None]


def pad_right(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Pads lists of ids on the right: (B, longest) int64 ids and a bool mask, true on the given ids."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    width = int(lengths.max()) if len(rows) else 0
    ids = torch.tensor([list(row) + [pad_id] * (width - len(row)) for row in rows], dtype=torch.int64)
    return ids.reshape(len(rows), width), torch.arange(width) < lengths[:, None]


def scatter(values: Tensor, mask: Tensor) -> Tensor:
    """Puts the values of valid positions (N,), row by row, back to the shape (B, T) of the mask; zero elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
