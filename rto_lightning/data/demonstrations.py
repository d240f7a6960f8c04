"""Demonstrations: a prompt and the answer to imitate. For SFT."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from rto_lightning.backbone.chat import ChatTokenizer
from rto_lightning.backbone.sequences import Sequences
from rto_lightning.data.batches import DemonstrationBatch
from rto_lightning.data.files import Row
from rto_lightning.data.formats import Demonstration, demonstration_reader
from rto_lightning.data.module import AnswerDataModule, encode_answers
from rto_lightning.data.rows import TokenIds
from rto_lightning.data.sources import Table
from rto_lightning.data.tokenizing import Encoded


@dataclass(frozen=True)
class DemonstrationRow:
    """One tokenized demonstration."""

    index: int
    prompt: TokenIds
    response: TokenIds


class DemonstrationDataModule(AnswerDataModule):
    """Answers to imitate.

    Columns: `prompt` with `response` or `completion`; `messages`, whose last one is the answer; `instruction`, perhaps
    with an `input`, and `output`; or a preference data set, whose chosen answers are taken.
    """

    row = DemonstrationRow

    def reader(self, table: Table) -> Callable[[Row], Demonstration]:
        """Reads a demonstration."""
        return demonstration_reader(table)

    def encoder(self) -> Callable[[ChatTokenizer, Sequence[Encoded[Demonstration]]], list[DemonstrationRow]]:
        """Demonstrations to rows."""
        return partial(encode_demonstrations, max_response_tokens=self.max_response_tokens)

    def collate(self, chat: ChatTokenizer) -> Callable[[list[DemonstrationRow]], DemonstrationBatch]:
        """Rows to a `DemonstrationBatch`."""
        return partial(collate_demonstrations, pad_id=chat.pad_id)


def encode_demonstrations(
    chat: ChatTokenizer, demonstrations: Sequence[Encoded[Demonstration]], max_response_tokens: int
) -> list[DemonstrationRow]:
    """Demonstrations to rows, the answers cut at the limit."""
    responses = encode_answers(chat, [row.example.response for row in demonstrations], max_response_tokens)
    return [
        DemonstrationRow(row.index, row.prompt, response)
        for row, response in zip(demonstrations, responses, strict=True)
    ]


def collate_demonstrations(rows: Sequence[DemonstrationRow], pad_id: int) -> DemonstrationBatch:
    """Puts demonstrations into one batch."""
    sequences = Sequences.from_lists([row.prompt for row in rows], [row.response for row in rows], pad_id)
    return DemonstrationBatch(sequences, torch.tensor([row.index for row in rows]))
