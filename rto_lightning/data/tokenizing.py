"""Raw rows to tokenized ones: what can be done with any chunk of a table, in any process."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

from rto_lightning.backbone.chat import ChatTokenizer
from rto_lightning.data.files import Row
from rto_lightning.data.formats import BadRows, BadRowsSetting, Example, read_rows
from rto_lightning.data.rows import RowT
from rto_lightning.data.sources import Table
from rto_lightning.errors import UserError

_COMMON_ANSWERS = 100
"""Answers of a chunk whose number is kept. What is not among them is no more than a hundredth of the answers."""


@dataclass(frozen=True)
class Encoded(Generic[Example]):
    """A usable row whose prompt is tokenized."""

    index: int
    """In the table, from 0."""
    example: Example
    prompt: array
    """(length,) ids, as all arrays here of type code `i`."""


@dataclass
class Counts:
    """What was met in rows that were tokenized."""

    examples: int = 0
    """Rows of a known format, including those with a prompt that is refused or too long."""
    bad: int = 0
    """Rows that were skipped because they are bad."""
    too_long: int = 0
    """Rows that were dropped because of the length of their prompt."""
    answers: Counter[str] = field(default_factory=Counter)
    """How often the commonest answers occur, at least."""

    def add(self, other: "Counts") -> None:
        """Takes in those of other rows."""
        self.examples += other.examples
        self.bad += other.bad
        self.too_long += other.too_long
        self.answers.update(other.answers)
        if len(self.answers) > 100 * _COMMON_ANSWERS:
            self.answers = Counter(dict(self.answers.most_common(10 * _COMMON_ANSWERS)))


@dataclass(frozen=True)
class RowTokenizer(Generic[Example, RowT]):
    """Reads and tokenizes rows of a table; picklable, for other processes."""

    table: Table
    read: Callable[[Row], Example]
    """What one of the functions in `formats.py` returned for the table."""
    encode: Callable[[ChatTokenizer, Sequence[Encoded[Example]]], list[RowT]]
    """Tokenizes the rest of usable rows."""
    answers: Callable[[Example], Sequence[str]]
    """The texts of an example of which one that occurs often is worth a warning."""
    kind: type[RowT]
    """The dataclass of the tokenized rows."""
    chat: ChatTokenizer
    max_prompt_tokens: int
    bad_rows: BadRowsSetting

    def usable(self, rows: Iterable[tuple[int, Row]]) -> tuple[list[Encoded[Example]], Counts]:
        """The rows, of some with their index, that are neither bad nor have a prompt that is too long; and the counts.

        Raises:
            UserError: If a row is bad and bad rows are errors.
        """
        bad_rows = BadRows(self.table, self.bad_rows)
        examples = read_rows(self.read, rows, bad_rows)
        encoded = self._encode_prompts(examples, bad_rows)
        kept = [row for row in encoded if len(row.prompt) <= self.max_prompt_tokens]
        answers = Counter(answer for _, example in examples for answer in self.answers(example))
        common = Counter(dict(answers.most_common(_COMMON_ANSWERS)))
        return kept, Counts(len(examples), bad_rows.count, len(encoded) - len(kept), common)

    def tokenize(self, rows: Iterable[tuple[int, Row]]) -> tuple[list[RowT], Counts]:
        """Those rows tokenized, and the counts; see `usable`."""
        kept, counts = self.usable(rows)
        return self.encode(self.chat, kept), counts

    def remarks(self, counts: Counts) -> list[str]:
        """What a user should know of all rows that were met, a line each."""
        name, lines = self.table.name, []
        for answer, count in counts.answers.most_common(1):
            # One text that answers many prompts is seldom wanted: an attack on the judge, a refusal, a placeholder.
            # The public AlpacaEval annotations hold such an attack, which wins most of its comparisons.
            if count >= 20 and count > 0.05 * counts.examples:
                of_all = f"{count} of {counts.examples} pairs"
                lines.append(f"{name}: one and the same answer stands in {of_all} ({answer[:40]!r}...).")
        if counts.bad:
            lines.append(f"{name}: skipped {counts.bad} bad rows.")
        if counts.too_long:
            lines.append(f"{name}: dropped {counts.too_long} prompts of more than {self.max_prompt_tokens} tokens.")
        return lines

    def nothing_left(self, counts: Counts) -> UserError:
        """What to raise if no row is usable."""
        return UserError(
            f"{self.table.name} has no usable row: {counts.bad} are bad and {counts.too_long} have a prompt of "
            f"more than data.max_prompt_tokens = {self.max_prompt_tokens} tokens; correct them or raise the limit."
        )

    def _encode_prompts(self, examples: Sequence[tuple[int, Example]], bad_rows: BadRows) -> list[Encoded[Example]]:
        """Examples with the ids of their prompts, without those that the chat template refuses."""
        try:
            prompts = self.chat.encode_prompts([example.prompt for _, example in examples])
        except UserError as error:
            if len(examples) == 1:
                bad_rows.add(examples[0][0], f"the chat template refuses its prompt ({error.__cause__})")
                return []
            return [row for example in examples for row in self._encode_prompts([example], bad_rows)]
        return [Encoded(index, example, compact(ids)) for (index, example), ids in zip(examples, prompts, strict=True)]


def no_answers(example: Any) -> Sequence[str]:
    """For kinds of data of which no answer is counted."""
    return ()


def compact(ids: Sequence[int]) -> array:
    """Ids in four bytes each; a list of ints takes nine times as many."""
    return array("i", ids)
