"""Prompts without answers. For RTO, which samples the answers itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from rto_lightning.backbone.chat import ChatTokenizer, Message
from rto_lightning.backbone.sequences import pad_left
from rto_lightning.data.batches import PromptBatch
from rto_lightning.data.files import Row
from rto_lightning.data.formats import Prompt, prompt_reader
from rto_lightning.data.module import ChatDataModule
from rto_lightning.data.rows import TokenIds
from rto_lightning.data.sources import Table
from rto_lightning.data.tokenizing import Encoded


@dataclass(frozen=True)
class PromptRow:
    """One tokenized prompt."""

    index: int
    prompt: TokenIds
    messages: list[Message]


class PromptDataModule(ChatDataModule):
    """Prompts to answer.

    Columns: `context_messages`, `prompt` (text or a list of messages), `messages` (whose last answer is left
    out) or `instruction`, perhaps with an `input`; or a preference data set, whose answers are left out.
    """

    row = PromptRow

    def reader(self, table: Table) -> Callable[[Row], Prompt]:
        """Reads a prompt."""
        return prompt_reader(table)

    def encoder(self) -> Callable[[ChatTokenizer, Sequence[Encoded[Prompt]]], list[PromptRow]]:
        """Prompts to rows."""
        return encode_prompts

    def collate(self, chat: ChatTokenizer) -> Callable[[list[PromptRow]], PromptBatch]:
        """Rows to a `PromptBatch`."""
        return partial(collate_prompts, pad_id=chat.pad_id)


def encode_prompts(chat: ChatTokenizer, prompts: Sequence[Encoded[Prompt]]) -> list[PromptRow]:
    """Prompts to rows; nothing is left to tokenize."""
    return [PromptRow(row.index, row.prompt, row.example.prompt) for row in prompts]


def collate_prompts(rows: Sequence[PromptRow], pad_id: int) -> PromptBatch:
    """Puts prompts into one batch."""
    input_ids, mask = pad_left([row.prompt for row in rows], pad_id)
    return PromptBatch(
        input_ids, mask.long(), torch.tensor([row.index for row in rows]), [row.messages for row in rows]
    )
