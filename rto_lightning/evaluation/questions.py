"""The questions of a benchmark: AlpacaEval 2, Arena-Hard in its two formats, or prompts of one's own.

| format | recognised by | id | category |
|---|---|---|---|
| `alpaca_eval` | `instruction` | the instruction itself | `dataset` |
| `arena_hard_v0.1` | `question_id` and `turns` | `question_id` | `category` |
| `arena_hard_v2.0` | `uid` and `prompt` | `uid` | `subcategory` or else `category` |
| `alpaca_eval` | what `data.formats` reads as prompts | the prompt | |
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from rto_lightning.backbone import Message
from rto_lightning.data.files import BadRow, Row
from rto_lightning.data.formats import Prompt, prompt_reader
from rto_lightning.data.sources import Table, load_table
from rto_lightning.errors import UserError

Read = TypeVar("Read")
Format = Literal["alpaca_eval", "arena_hard_v0.1", "arena_hard_v2.0"]

MOST_NAMED = 5
"""Ids that a message names; of the others it tells the number."""

_ALPACA_EVAL_COLUMNS = ("dataset", "datasplit")


class BenchmarkError(UserError):
    """Questions or answers that cannot be compared, with the ids of those at fault."""

    exit_status = 2


@dataclass(frozen=True)
class Question:
    """One question of a benchmark."""

    id: str
    """By which its answers are found."""
    text: str
    """What the user says."""
    category: str = ""
    """Part of the benchmark; empty where it has none."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Further columns that the answer repeats."""

    @property
    def messages(self) -> list[Message]:
        """The conversation to be continued."""
        return [{"role": "user", "content": self.text}]


@dataclass(frozen=True)
class Questions:
    """All questions of one source, in its order."""

    format: Format
    """In which answers to them are written."""
    rows: list[Question]
    """At least one; no id twice."""

    @property
    def fingerprint(self) -> str:
        """Changes with every id and text."""
        return hashlib.sha256(json.dumps([(row.id, row.text) for row in self.rows]).encode()).hexdigest()[:16]


def read_questions(source: str, max_rows: int | None = None) -> Questions:
    """Reads questions from a file, a folder or a data set, as :func:`load_table` finds them.

    Raises:
        BenchmarkError: if a row is no question, or an id occurs twice.
        UserError: if the source cannot be read.
    """
    table = load_table(source, max_rows)
    kind, read = _reader(table)
    questions = list(read_all(table, read))
    refuse_ids(repeated(question.id for question in questions), f"{source} has", "more than once", "remove them")
    return Questions(kind, questions)


def read_all(table: Table, read: Callable[[Row], Read]) -> Iterator[Read]:
    """What `read` makes of each row of a table.

    Raises:
        BenchmarkError: with the place of the first row of which it makes nothing.
    """
    for index, row in enumerate(table.rows):
        try:
            if isinstance(row, BadRow):
                raise row
            yield read(row)
        except (BadRow, KeyError, IndexError, TypeError) as error:
            why = str(error) if isinstance(error, BadRow) else "it is not of the format of the other rows"
            raise BenchmarkError(f"{table.place(index)}: {why}; correct the file.") from error


def text_of(value: Any, name: str) -> str:
    """A value that has to be text.

    Raises:
        BadRow: if it is none, or text that cannot be written to any file.
    """
    if not isinstance(value, str):
        raise BadRow(f"`{name}` is missing or no text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"`{name}` has the lone surrogate {value[error.start]!r}, which is no character") from error
    return value


def repeated(ids: Iterable[str]) -> list[str]:
    """Those that occur more than once."""
    return [name for name, count in Counter(ids).items() if count > 1]


def refuse_ids(ids: Iterable[str], what: str, how: str, way_out: str) -> None:
    """Raise BenchmarkError with a sentence about ids, unless there are none."""
    if found := list(ids):
        raise BenchmarkError(f"{what} {listed(found)} {how}".rstrip() + f"; {way_out}.")


def listed(ids: Sequence[str]) -> str:
    """Some ids by their names, or what these begin with, and the number of the others."""
    named = [repr(name if len(name) <= 60 else name[:60] + "...") for name in ids[:MOST_NAMED]]
    return ", ".join(named) + (f" and {len(ids) - MOST_NAMED} more" if len(ids) > MOST_NAMED else "")


def _reader(table: Table) -> tuple[Format, Callable[[Row], Question]]:
    columns = set(table.columns)
    if "instruction" in columns:
        return "alpaca_eval", _alpaca_eval
    if {"question_id", "turns"} <= columns:
        return "arena_hard_v0.1", _arena_hard_old
    if {"uid", "prompt"} <= columns:
        return "arena_hard_v2.0", _arena_hard_new
    read = prompt_reader(table)
    return "alpaca_eval", lambda row: _of_prompt(read(row))


def _alpaca_eval(row: Row) -> Question:
    text = _text(row.get("instruction"), "instruction")
    columns = {name: row[name] for name in _ALPACA_EVAL_COLUMNS if isinstance(row.get(name), str)}
    return Question(text, text, columns.get("dataset", ""), columns)


def _arena_hard_old(row: Row) -> Question:
    turns = row.get("turns")
    if not isinstance(turns, list) or len(turns) != 1 or not isinstance(turns[0], dict):
        raise BadRow("`turns` is not a list of one turn; questions of several turns are not supported")
    text = _text(turns[0].get("content"), "turns")
    # There are two questions for each of 250 clusters, too few to tell anything.
    return Question(_text(row.get("question_id"), "question_id"), text, _category(row, "category"))


def _arena_hard_new(row: Row) -> Question:
    return Question(_text(row.get("uid"), "uid"), _text(row.get("prompt"), "prompt"), _category(row, "subcategory"))


def _of_prompt(example: Prompt) -> Question:
    if len(example.prompt) != 1:
        raise BadRow("it has several messages, for which the format of AlpacaEval has no place")
    text = text_of(example.prompt[0]["content"], "prompt")
    return Question(text, text)


def _category(row: Row, name: str) -> str:
    value = row.get(name) or row.get("category")
    return value if isinstance(value, str) else ""


def _text(value: Any, name: str) -> str:
    if not text_of(value, name).strip():
        raise BadRow(f"`{name}` is empty")
    return str(value)
