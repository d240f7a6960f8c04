"""Raw rows to tokenized ones: what can be done with any chunk of a table, in any process."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from rto_lightning.backbone.chat import ChatTokenizer
from rto_lightning.data.files import RawRow, Row, reason_of
from rto_lightning.data.formats import BadRows, BadRowsSetting, Example, read_rows
from rto_lightning.data.rows import RowT, TokenIds
from rto_lightning.data.sources import Table
from rto_lightning.errors import UserError

_COMMON_ANSWERS = 100
"""Answers of a chunk whose number is kept. What is not among them is no more than a hundredth of the answers."""
_CHARACTERS_OF_ANSWER = 1000
"""Answers that begin with the same so many are counted as one and the same, so that counts take little memory."""
_CHARACTERS_AT_ONCE = 2**20
"""Of texts that are tokenized together: what the library returns takes some hundred bytes for each."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class Encoded(Generic[Example]):
    """A usable row whose prompt is tokenized."""

    index: int
    """In the table, from 0."""
    example: Example
    prompt: TokenIds
    """(length,) ids, as all arrays here of type code `i`."""


@dataclass
class Counts:
    """What was met in rows that were tokenized."""

    examples: int = 0
    """Rows of a known format, including those with a prompt that is refused or too long."""
    bad: int = 0
    """Rows that were skipped because they are bad."""
    first_bad: tuple[int, str] | None = None
    """The first of them, by its index, and why."""
    too_long: int = 0
    """Rows that were dropped because of the length of their prompt."""
    answers: Counter[str] = field(default_factory=Counter)
    """How often the commonest answers occur, at least, by their beginning."""

    def add(self, other: "Counts") -> None:
        """Takes in those of other rows."""
        self.examples += other.examples
        self.bad += other.bad
        self.first_bad = self.first_bad or other.first_bad
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

    def usable(self, rows: Iterable[tuple[int, RawRow]]) -> tuple[list[Encoded[Example]], Counts]:
        """The rows, of some with their index, that are neither bad nor have a prompt that is too long; and the counts.

        Raises:
            UserError: If a row is bad and bad rows are errors.
        """
        bad_rows = BadRows(self.table, self.bad_rows)
        examples = read_rows(self.read, rows, bad_rows)
        whole = self._whole_prompts(examples, bad_rows)
        parts = in_parts(whole, lambda item: sum(len(message["content"]) for message in item[1].prompt))
        encoded = [row for part in parts for row in self._encode_prompts(part, bad_rows)]
        kept = [row for row in encoded if len(row.prompt) <= self.max_prompt_tokens]
        answers = (answer[:_CHARACTERS_OF_ANSWER] for _, example in examples for answer in self.answers(example))
        common = Counter(dict(Counter(answers).most_common(_COMMON_ANSWERS)))
        counts = Counts(len(examples), bad_rows.count, bad_rows.first, len(encoded) - len(kept), common)
        return kept, counts

    def tokenize(self, rows: Iterable[tuple[int, RawRow]]) -> tuple[list[RowT], Counts]:
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
            lines.append(self.bad_remark(counts))
        if counts.too_long:
            lines.append(f"{name}: dropped {counts.too_long} prompts of more than {self.max_prompt_tokens} tokens.")
        return lines

    def bad_remark(self, counts: Counts) -> str:
        """How many rows were skipped because they are bad, of at least one, and what is wrong with the first."""
        return f"{self.table.name}: skipped {counts.bad} bad rows, the first of them {self._first_bad(counts)}."

    def nothing_left(self, counts: Counts) -> UserError:
        """What to raise if no row is usable."""
        return UserError(f"{self.table.name} has no usable row: {self.unusable(counts)}; correct them or the limit.")

    def unusable(self, counts: Counts) -> str:
        """How many rows were left out and why, as a clause."""
        first = f" (the first is {self._first_bad(counts)})" if counts.bad else ""
        return (
            f"{counts.bad} are bad{first} and {counts.too_long} have a prompt of more than data.max_prompt_tokens = "
            f"{self.max_prompt_tokens} tokens"
        )

    def _first_bad(self, counts: Counts) -> str:
        assert counts.first_bad is not None
        index, reason = counts.first_bad
        return f"{self.table.place(index)}: {reason}"

    def _whole_prompts(self, examples: Sequence[tuple[int, Example]], bad_rows: BadRows) -> list[tuple[int, Example]]:
        """Examples of which the chat template writes every turn; some templates silently drop the system's."""
        roles = {tuple(message["role"] for message in example.prompt) for _, example in examples}
        dropped = {of_one: _dropped_turn(self.chat, of_one) for of_one in roles}
        whole = []
        for index, example in examples:
            role = dropped[tuple(message["role"] for message in example.prompt)]
            if role is None:
                whole.append((index, example))
            else:
                bad_rows.add(index, f"the chat template leaves out its {role} message")
        return whole

    def _encode_prompts(self, examples: Sequence[tuple[int, Example]], bad_rows: BadRows) -> list[Encoded[Example]]:
        """Examples with the ids of their prompts, without those that the chat template refuses."""
        try:
            prompts = self.chat.encode_prompts([example.prompt for _, example in examples])
        except UserError as error:
            if len(examples) == 1:
                reason = reason_of(error.__cause__ or error)
                bad_rows.add(examples[0][0], f"the chat template refuses its prompt ({reason})")
                return []
            return [row for example in examples for row in self._encode_prompts([example], bad_rows)]
        encoded = []
        for (index, example), ids in zip(examples, prompts, strict=True):
            if ids:
                encoded.append(Encoded(index, example, compact(ids)))
            else:  # nothing could predict the first token of an answer
                bad_rows.add(index, "its prompt has no tokens")
        return encoded


def _dropped_turn(chat: ChatTokenizer, roles: Sequence[str]) -> str | None:
    """The role of the first message that the template leaves out of conversations of these roles; None if none is."""
    contents = [f"Turn {number}." for number in range(len(roles))]
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    try:
        text = chat.render_prompt(messages)
    except UserError:  # as it will refuse the conversations themselves
        return None
    return next((role for role, content in zip(roles, contents, strict=True) if content not in text), None)


def in_parts(items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Items in their order, in parts of at least one item whose sizes (characters) are together no more than fits."""
    part: list[Item] = []
    room = _CHARACTERS_AT_ONCE
    for item in items:
        if part and size(item) > room:
            yield part
            part, room = [], _CHARACTERS_AT_ONCE
        part.append(item)
        room -= size(item)
    if part:
        yield part


def no_answers(example: Any) -> Sequence[str]:
    """For kinds of data of which no answer is counted."""
    return ()


def compact(ids: Sequence[int]) -> TokenIds:
    """Ids in four bytes each; a list of ints takes nine times as many."""
    return array("i", ids)
