"""What the columns of a data set mean: tables to conversations with their answers.

The format of a row is recognised by its columns, and within a column by the value: text or a list of messages.

| read as | columns |
|---|---|
| preferences | `prompt` (text or messages), `chosen`, `rejected` (text or messages) |
| | `chosen`, `rejected` with the prompt inside: messages, or transcripts like Anthropic's HH |
| prompts | `context_messages`, `prompt`, `messages`, or preferences |
| demonstrations | `prompt` with `response` or `completion`, `messages`, or preferences (their `chosen`) |
| both | `instruction`, perhaps with an `input`, and for demonstrations `output`, as Alpaca and AlpacaEval have them |

In UltraFeedback both hold: `prompt` is a text and `chosen` repeats it; the messages win, they may have more
turns.
"""

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

from lightning.pytorch.utilities import rank_zero_only

from rto_lightning.backbone.chat import Message
from rto_lightning.data.files import MOST_CHARACTERS, BadRow, RawRow, Row
from rto_lightning.data.sources import Table
from rto_lightning.errors import UserError

BadRowsSetting = Literal["error", "skip"]
ROLES = ("system", "user", "assistant", "tool")

_log = logging.getLogger(__name__)
_TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for an answer."""

    prompt: list[Message]
    """The turns so far. The last one is not the assistant's."""


@dataclass(frozen=True)
class Preference(Prompt):
    """A prompt with two answers, one of which was preferred."""

    chosen: str
    rejected: str


@dataclass(frozen=True)
class Demonstration(Prompt):
    """A prompt with the answer to imitate."""

    response: str


Example = TypeVar("Example", bound=Prompt)
_Formats = Mapping[tuple[str, ...], Callable[[Row], Example]]
"""What reads a row that has certain columns."""


class BadRows:
    """Raises at the first unusable row of a table, or counts them, as the setting of this name says."""

    def __init__(self, table: Table, setting: BadRowsSetting, name: str = "data.bad_rows") -> None:
        self.table = table
        self.setting = setting
        self.name = name
        self.count = 0
        self.first: tuple[int, str] | None = None
        """The first of them, and why."""

    def add(self, index: int, reason: str) -> None:
        """Takes note of row `index` (from 0).

        Raises:
            UserError: If bad rows are errors.
        """
        if self.setting == "error":
            raise UserError(f"{self.table.place(index)}: {reason}; correct it, or set {self.name} to `skip`.")
        self.count += 1
        self.first = min(self.first or (index, reason), (index, reason))


@rank_zero_only
def warn(message: str) -> None:
    """One line about the data, from one process."""
    _log.warning(message)


def preference_reader(table: Table) -> Callable[[Row], Preference]:
    """What reads a row of a preference data set; picklable.

    Raises:
        UserError: If the columns are none of such a data set.
    """
    expected = "`chosen` and `rejected`, with `prompt` or with the prompt inside them"
    formats: _Formats[Preference] = {("chosen", "rejected"): _preference}
    return _reader(table, formats, expected)


def prompt_reader(table: Table) -> Callable[[Row], Prompt]:
    """What reads the prompt of a row; picklable.

    Raises:
        UserError: If there is no column with prompts.
    """
    formats: _Formats[Prompt] = {
        ("context_messages",): _prompt_from_context,
        ("chosen",): _prompt_of_preference,
        ("prompt",): _prompt,
        ("messages",): _prompt_of_messages,
        ("instruction",): _prompt_of_instruction,
    }
    return _reader(table, formats, "one of `prompt`, `messages`, `context_messages`, `chosen` and `instruction`")


def demonstration_reader(table: Table) -> Callable[[Row], Demonstration]:
    """What reads a row of a data set of demonstrations; picklable.

    Raises:
        UserError: If the columns are none of such a data set.
    """
    formats: _Formats[Demonstration] = {
        columns: partial(_demonstration, column=columns[-1])
        for columns in (("prompt", "response"), ("prompt", "completion"), ("messages",), ("chosen",))
    }
    formats = {**formats, ("instruction", "output"): _demonstration_of_instruction}
    expected = "`prompt` with `response` or `completion`, or `instruction` with `output`, or `messages`, or `chosen`"
    return _reader(table, formats, expected)


def read_rows(
    read: Callable[[Row], Example], rows: Iterable[tuple[int, RawRow]], bad_rows: BadRows
) -> list[tuple[int, Example]]:
    """The usable ones of some rows, each with its index in the table.

    Args:
        read: What one of the functions above returned.
        rows: Rows with their index.
        bad_rows: Is told of the others.

    Raises:
        UserError: If a row is bad and bad rows are errors.
    """
    examples = []
    for index, row in rows:
        try:
            if isinstance(row, BadRow):
                raise row
            example = read(row)
            _check_texts(example)
            examples.append((index, example))
        except BadRow as reason:
            bad_rows.add(index, str(reason))
    return examples


def _reader(table: Table, formats: _Formats[Example], expected: str) -> Callable[[Row], Example]:
    """What reads each row by the first of the formats whose columns it has; of a table that has those of one."""
    of_table = next((read for columns, read in formats.items() if set(columns) <= set(table.columns)), None)
    if of_table is None:
        found = ", ".join(f"`{column[:40]}`" for column in table.columns[:20]) or "none"
        raise UserError(f"{table.name} has the columns {found}, but needs {expected}; rename or add columns.")
    return partial(_read_row, formats, of_table)


# One row.


def _read_row(formats: _Formats[Example], otherwise: Callable[[Row], Example], row: Row) -> Example:
    # By its own columns, so that no single row with others makes all the rest bad.
    read = next((read for columns, read in formats.items() if row.keys() >= set(columns)), otherwise)
    return read(row)


def _check_texts(example: Prompt) -> None:
    """Refuses what no tokenizer takes."""
    answers = (text for text in vars(example).values() if isinstance(text, str))
    text = "".join([*(message["content"] for message in example.prompt), *answers])
    if len(text) > MOST_CHARACTERS:
        raise BadRow(f"its texts have more than {MOST_CHARACTERS} characters")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"a text has the lone surrogate {text[error.start]!r}, which is no character") from error


def _preference(row: Row) -> Preference:
    prompt, chosen = _answered(row, "chosen")
    other_prompt, rejected = _answered(row, "rejected")
    if prompt != other_prompt:
        raise BadRow("`chosen` and `rejected` answer different prompts")
    return Preference(prompt, chosen, rejected)


def _demonstration(row: Row, column: str) -> Demonstration:
    return Demonstration(*_answered(row, column))


def _demonstration_of_instruction(row: Row) -> Demonstration:
    return _demonstration({"prompt": _instruction(row), "output": row.get("output")}, "output")


def _prompt_of_instruction(row: Row) -> Prompt:
    return _prompt({"prompt": _instruction(row)})


def _instruction(row: Row) -> str:
    """An instruction, and below it what it is about if there is an `input`."""
    instruction, subject = row.get("instruction"), row.get("input") or ""
    if not isinstance(instruction, str) or not isinstance(subject, str):
        raise BadRow("`instruction` or `input` is no text")
    if not instruction.strip():
        raise BadRow("the prompt in `instruction` is empty")
    return f"{instruction}\n\n{subject}" if subject.strip() else instruction


def _prompt_from_context(row: Row) -> Prompt:
    return Prompt(_ending_in_a_question(_messages(row, "context_messages"), "context_messages"))


def _prompt_of_preference(row: Row) -> Prompt:
    return Prompt(_answered(row, "chosen")[0])


def _prompt(row: Row) -> Prompt:
    return Prompt(_question(row))


def _prompt_of_messages(row: Row) -> Prompt:
    messages = _messages(row, "messages")
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return Prompt(_ending_in_a_question(messages, "messages"))


def _answered(row: Row, column: str) -> tuple[list[Message], str]:
    """The prompt of a row and the answer to it in a column, which may hold the prompt too."""
    value = row.get(column)
    if isinstance(value, list):
        *context, last = _messages(row, column)
        if last["role"] != "assistant":
            raise BadRow(f"the last message of `{column}` is not the assistant's")
        prompt, answer = _joined(row, context, column), last["content"]
    elif not isinstance(value, str):
        raise BadRow(f"`{column}` is neither text nor a list of messages")
    elif row.get("prompt") is not None:
        prompt, answer = _question(row), value
        if _is_transcript(row["prompt"]):
            answer = answer.strip()
    elif _is_transcript(value):
        *context, last = _transcript(value, column)
        if last["role"] != "assistant":
            raise BadRow(f"the last turn of `{column}` is not the assistant's")
        prompt, answer = _ending_in_a_question(context, column), last["content"]
    else:
        raise BadRow(f"`prompt` is missing and `{column}` is no transcript that holds it")
    if not answer.strip():
        raise BadRow(f"the answer in `{column}` is empty")
    return prompt, answer


def _joined(row: Row, context: list[Message], column: str) -> list[Message]:
    """The prompt of a row whose answer is the end of a list of messages, which `context` precede."""
    given = row.get("prompt")
    if not context:
        return _question(row)
    if isinstance(given, list):
        question = _messages(row, "prompt")
        if context[: len(question)] != question:
            context = question + context
    return _ending_in_a_question(context, column)


def _question(row: Row) -> list[Message]:
    """The prompt of the column `prompt`."""
    value = row.get("prompt")
    if isinstance(value, list):
        return _ending_in_a_question(_messages(row, "prompt"), "prompt")
    if not isinstance(value, str):
        raise BadRow("`prompt` is neither text nor a list of messages")
    if _is_transcript(value):
        messages = _transcript(value, "prompt")
        if messages[-1] == {"role": "assistant", "content": ""}:  # ends with "\n\nAssistant:"
            messages = messages[:-1]
        return _ending_in_a_question(messages, "prompt")
    return _ending_in_a_question([{"role": "user", "content": value}], "prompt")


def _ending_in_a_question(messages: list[Message], column: str) -> list[Message]:
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise BadRow(f"the prompt in `{column}` does not end with a message of the user")
    if not messages[-1]["content"].strip():
        raise BadRow(f"the prompt in `{column}` is empty")
    return messages


def _messages(row: Row, column: str) -> list[Message]:
    """A column's messages, with nothing but role and content."""
    value = row.get(column)
    if not isinstance(value, list) or not value:
        raise BadRow(f"`{column}` is not a list of messages")
    return [_message(message, column) for message in value]


def _message(message: Any, column: str) -> Message:
    if not isinstance(message, dict):
        raise BadRow(f"a message of `{column}` is not an object with `role` and `content`")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise BadRow(f"a message of `{column}` has no `role` and `content` of text")
    if role not in ROLES:
        raise BadRow(f"a message of `{column}` has the role {role[:40]!r}, which is none of {', '.join(ROLES)}")
    return {"role": role, "content": content}


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("\n\nHuman:")


def _transcript(text: str, column: str) -> list[Message]:
    r"""Turns of a text like "\n\nHuman: Hi\n\nAssistant: Hello" (Anthropic's HH)."""
    _, *parts = _TURN.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        _message({"role": roles[speaker], "content": content.strip()}, column)
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]
