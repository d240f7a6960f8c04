"""Prompts without answers. For RTO, which samples the answers itself."""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from rto_lightning.backbone.chat import ChatTokenizer, Message
from rto_lightning.backbone.sequences import pad_left
from rto_lightning.data.batches import PromptBatch
from rto_lightning.data.formats import BadRows, Prompt, read_prompts
from rto_lightning.data.module import ChatDataModule
from rto_lightning.data.sources import Table


@dataclass(frozen=True)
class PromptRow:
    """One tokenized prompt."""

    index: int
    prompt: array
    messages: list[Message]


class PromptDataModule(ChatDataModule):
    """Prompts to answer.

    Columns: `context_messages`, `prompt` (text or a list of messages) or `messages` (whose last answer is
    left out); or a preference data set, whose answers are left out.
    """

    def read(self, table: Table, bad_rows: BadRows) -> list[tuple[int, Prompt]]:
        """The usable prompts of a table."""
        return read_prompts(table, bad_rows)

    def tokenize(
        self, chat: ChatTokenizer, examples: Sequence[tuple[int, Prompt]], prompts: Sequence[array]
    ) -> list[PromptRow]:
        """Prompts to rows."""
        return [PromptRow(index, ids, example.prompt) for (index, example), ids in zip(examples, prompts, strict=True)]

    def collate(self, chat: ChatTokenizer) -> Callable[[list[PromptRow]], PromptBatch]:
        """Rows to a `PromptBatch`."""
        return partial(collate_prompts, pad_id=chat.pad_id)


def collate_prompts(rows: Sequence[PromptRow], pad_id: int) -> PromptBatch:
    """Puts prompts into one batch."""
    input_ids, mask = pad_left([row.prompt for row in rows], pad_id)
    return PromptBatch(
        input_ids, mask.long(), torch.tensor([row.index for row in rows]), [row.messages for row in rows]
    )
