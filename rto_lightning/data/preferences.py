"""Preference data: a prompt, a chosen and a rejected answer. For DPO and the reward model."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from rto_lightning.backbone.chat import ChatTokenizer
from rto_lightning.backbone.sequences import Sequences
from rto_lightning.data.batches import PreferenceBatch
from rto_lightning.data.formats import BadRows, Preference, read_preferences, warn
from rto_lightning.data.module import AnswerDataModule
from rto_lightning.data.sources import Table


@dataclass(frozen=True)
class PreferenceRow:
    """One tokenized pair."""

    index: int
    prompt: array
    chosen: array
    rejected: array
    characters: tuple[int, int]
    """Lengths of both answers' text."""
    cluster: int
    """A hash of the prompt, so that it is the same in every process and source."""


class PreferenceDataModule(AnswerDataModule):
    """Pairs of answers, one of which was preferred.

    Columns: `prompt` with `chosen` and `rejected`, each text or a list of messages; or `chosen` and
    `rejected` with the prompt inside, as messages or as transcripts like Anthropic's HH.
    """

    def read(self, table: Table, bad_rows: BadRows) -> list[tuple[int, Preference]]:
        """The usable pairs of a table."""
        pairs = read_preferences(table, bad_rows)
        _warn_of_a_constant_answer(pairs, table)
        return pairs

    def tokenize(
        self, chat: ChatTokenizer, examples: Sequence[tuple[int, Preference]], prompts: Sequence[array]
    ) -> list[PreferenceRow]:
        """Pairs to rows."""
        chosen = self.encode_answers(chat, [pair.chosen for _, pair in examples])
        rejected = self.encode_answers(chat, [pair.rejected for _, pair in examples])
        return [
            PreferenceRow(index, prompt, c, r, (len(pair.chosen), len(pair.rejected)), _cluster(prompt))
            for (index, pair), prompt, c, r in zip(examples, prompts, chosen, rejected, strict=True)
        ]

    def collate(self, chat: ChatTokenizer) -> Callable[[list[PreferenceRow]], PreferenceBatch]:
        """Rows to a `PreferenceBatch`."""
        return partial(collate_preferences, pad_id=chat.pad_id)


def _warn_of_a_constant_answer(pairs: Sequence[tuple[int, Preference]], table: Table) -> None:
    """One text that answers many prompts is seldom wanted: an attack on the judge, a refusal, a placeholder.

    The public AlpacaEval annotations hold such an attack, which wins most of its comparisons.
    """
    counts = Counter(answer for _, pair in pairs for answer in (pair.chosen, pair.rejected))
    for answer, count in counts.most_common(1):
        if count >= 20 and count > 0.05 * len(pairs):
            warn(f"{table.name}: one and the same answer stands in {count} of {len(pairs)} pairs ({answer[:40]!r}...).")


def _cluster(prompt: array) -> int:
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
