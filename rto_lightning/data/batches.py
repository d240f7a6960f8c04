"""What a training step receives: one frozen dataclass for each kind of data."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rto_lightning.backbone.chat import Message
from rto_lightning.backbone.sequences import Sequences


@dataclass(frozen=True)
class PromptBatch:
    """B prompts to answer."""

    input_ids: Tensor
    """(B, P) int64, padded on the left."""
    attention_mask: Tensor
    """(B, P) int64: 1 on the prompt's tokens."""
    index: Tensor
    """(B,) int64: the row in the data set, from 0."""
    messages: list[list[Message]]
    """B conversations, for reward sources that read text."""

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device | str | int) -> "PromptBatch":
        """The same batch on another device."""
        return PromptBatch(
            self.input_ids.to(device), self.attention_mask.to(device), self.index.to(device), self.messages
        )

    def repeated(self, times: int) -> "PromptBatch":
        """Each prompt `times` times in a row, for several responses to it; B becomes B * times."""
        if times == 1:
            return self
        return PromptBatch(
            self.input_ids.repeat_interleave(times, dim=0),
            self.attention_mask.repeat_interleave(times, dim=0),
            self.index.repeat_interleave(times),
            [messages for messages in self.messages for _ in range(times)],
        )


@dataclass(frozen=True)
class PreferenceBatch:
    """B prompts with two answers each."""

    sequences: Sequences
    """2B rows: B with the chosen answers, then B with the rejected ones, in the same order."""
    index: Tensor
    """(B,) int64: the row in the data set, from 0."""
    cluster: Tensor
    """(B,) int64, equal for pairs of one prompt, which are not independent of each other."""
    characters: Tensor
    """(2B,) int64: the length of the answers' text before truncation."""

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device | str | int) -> "PreferenceBatch":
        """The same batch on another device."""
        return PreferenceBatch(
            self.sequences.to(device),
            self.index.to(device),
            self.cluster.to(device),
            self.characters.to(device),
        )


@dataclass(frozen=True)
class DemonstrationBatch:
    """B prompts with the answer to imitate."""

    sequences: Sequences
    """B rows."""
    index: Tensor
    """(B,) int64: the row in the data set, from 0."""

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device | str | int) -> "DemonstrationBatch":
        """The same batch on another device."""
        return DemonstrationBatch(self.sequences.to(device), self.index.to(device))
