"""Preference data: a prompt, a chosen and a rejected answer. For DPO and the reward model."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from rto_lightning.backbone.chat import ChatTokenizer
from rto_lightning.backbone.sequences import Sequences
from rto_lightning.data.batches import PreferenceBatch
from rto_lightning.data.files import Row
from rto_lightning.data.formats import Preference, preference_reader
from rto_lightning.data.module import AnswerDataModule, encode_answers
from rto_lightning.data.rows import TokenIds
from rto_lightning.data.sources import Table
from rto_lightning.data.tokenizing import Encoded


@dataclass(frozen=True)
class PreferenceRow:
    """One tokenized pair."""

    index: int
    prompt: TokenIds
    chosen: TokenIds
    rejected: TokenIds
    characters: tuple[int, int]
    """Lengths of both answers' text."""
    cluster: int
    """A hash of the prompt, so that it is the same in every process and source."""


class PreferenceDataModule(AnswerDataModule):
    """Pairs of answers, one of which was preferred.

    Columns: `prompt` with `chosen` and `rejected`, each text or a list of messages; or `chosen` and
    `rejected` with the prompt inside, as messages or as transcripts like Anthropic's HH.
    """

    row = PreferenceRow

    def reader(self, table: Table) -> Callable[[Row], Preference]:
        """Reads a pair."""
        return preference_reader(table)

    def encoder(self) -> Callable[[ChatTokenizer, Sequence[Encoded[Preference]]], list[PreferenceRow]]:
        """Pairs to rows."""
        return partial(encode_preferences, max_response_tokens=self.max_response_tokens)

    def collate(self, chat: ChatTokenizer) -> Callable[[list[PreferenceRow]], PreferenceBatch]:
        """Rows to a `PreferenceBatch`."""
        return partial(collate_preferences, pad_id=chat.pad_id)

    def answers(self) -> Callable[[Preference], Sequence[str]]:
        """Both answers of a pair: one that stands in many pairs is pointed out."""
        return both_answers


def both_answers(pair: Preference) -> tuple[str, str]:
    """The chosen and the rejected one."""
    return pair.chosen, pair.rejected


def encode_preferences(
    chat: ChatTokenizer, pairs: Sequence[Encoded[Preference]], max_response_tokens: int
) -> list[PreferenceRow]:
    """Pairs to rows, the answers cut at the limit."""
    chosen = encode_answers(chat, [row.example.chosen for row in pairs], max_response_tokens)
    rejected = encode_answers(chat, [row.example.rejected for row in pairs], max_response_tokens)
    return [
        PreferenceRow(
            index=row.index,
            prompt=row.prompt,
            chosen=of_chosen,
            rejected=of_rejected,
            characters=(len(row.example.chosen), len(row.example.rejected)),
            cluster=_cluster(row.prompt),
        )
        for row, of_chosen, of_rejected in zip(pairs, chosen, rejected, strict=True)
    ]


def _cluster(prompt: TokenIds) -> int:
    """63 bits, which fit an int64, of a hash of the ids."""
    return int.from_bytes(hashlib.sha256(prompt.tobytes()).digest()[:8], "big") >> 1


def collate_preferences(rows: Sequence[PreferenceRow], pad_id: int) -> PreferenceBatch:
    """Puts pairs into one batch, chosen answers first."""
    return PreferenceBatch(
        sequences=Sequences.from_lists(
            [row.prompt for row in rows] * 2,
            [row.chosen for row in rows] + [row.rejected for row in rows],
            pad_id,
        ),
        index=torch.tensor([row.index for row in rows]),
        cluster=torch.tensor([row.cluster for row in rows]),
        characters=torch.tensor([row.characters for row in rows]).T.reshape(-1),
    )
