"""Demonstrations: a prompt and the answer to imitate. For SFT."""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from rto_lightning.backbone.chat import ChatTokenizer
from rto_lightning.backbone.sequences import Sequences
from rto_lightning.data.batches import DemonstrationBatch
from rto_lightning.data.formats import BadRows, Demonstration, read_demonstrations
from rto_lightning.data.module import AnswerDataModule
from rto_lightning.data.sources import Table


@dataclass(frozen=True)
class DemonstrationRow:
    """One tokenized demonstration."""

    index: int
    prompt: array
    response: array


class DemonstrationDataModule(AnswerDataModule):
    """Answers to imitate.

    Columns: `prompt` with `response` or `completion`; `messages`, whose last one is the answer; or a
    preference data set, whose chosen answers are taken.
    """

    def read(self, table: Table, bad_rows: BadRows) -> list[tuple[int, Demonstration]]:
        """The usable demonstrations of a table."""
        return read_demonstrations(table, bad_rows)

    def tokenize(
        self, chat: ChatTokenizer, examples: Sequence[tuple[int, Demonstration]], prompts: Sequence[array]
    ) -> list[DemonstrationRow]:
        """Demonstrations to rows."""
        responses = self.encode_answers(chat, [example.response for _, example in examples])
        return [
            DemonstrationRow(index, prompt, response)
            for (index, _), prompt, response in zip(examples, prompts, responses, strict=True)
        ]

    def collate(self, chat: ChatTokenizer) -> Callable[[list[DemonstrationRow]], DemonstrationBatch]:
        """Rows to a `DemonstrationBatch`."""
        return partial(collate_demonstrations, pad_id=chat.pad_id)


def collate_demonstrations(rows: Sequence[DemonstrationRow], pad_id: int) -> DemonstrationBatch:
    """Puts demonstrations into one batch."""
    sequences = Sequences.from_lists([row.prompt for row in rows], [row.response for row in rows], pad_id)
    return DemonstrationBatch(sequences, torch.tensor([row.index for row in rows]))
