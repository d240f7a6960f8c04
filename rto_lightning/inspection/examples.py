"""Responses and preference pairs of a source, row by row, and their rewards part by part."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from rto_lightning.data.formats import (
    BadRows,
    BadRowsSetting,
    Demonstration,
    Preference,
    demonstration_reader,
    preference_reader,
    read_rows,
    warn,
)
from rto_lightning.data.sources import load_table
from rto_lightning.inspection.reading import TokenRewardReader
from rto_lightning.inspection.responses import RewardedPair, RewardedResponse


@dataclass(frozen=True)
class Answer(Demonstration):
    """A response that is not of a pair."""

    truncated: bool = False
    """Whether it was cut off before its stop token, and so has none."""


def load_examples(
    source: str, max_rows: int | None = None, bad_rows: BadRowsSetting = "error"
) -> Iterator[tuple[int, Preference | Answer]]:
    """The rows of a source, each with its number from 0: pairs where it has `chosen` and `rejected`, else answers.

    What `predict` writes (`predictions.jsonl`) is such a source; its `truncated` is minded.

    Args:
        source: file, folder or data set, as for the data modules.
        max_rows: only the first this many rows; None for all.
        bad_rows: `error` stops at a row that cannot be used, `skip` leaves it out and warns with their number.

    Raises:
        UserError: if the source cannot be read or has other columns, or a row is bad and that is an error.
    """
    table = load_table(source, max_rows)
    paired = {"chosen", "rejected"} <= set(table.columns)
    read = preference_reader(table) if paired else demonstration_reader(table)
    bad = BadRows(table, bad_rows, "bad_rows")
    for index, row in enumerate(table.rows):
        for _, example in read_rows(read, [(index, row)], bad):
            if isinstance(example, Preference):
                yield index, example
            elif isinstance(example, Demonstration):
                was_cut = isinstance(row, dict) and row.get("truncated") is True
                yield index, Answer(example.prompt, example.response, was_cut)
    if bad.first is not None:
        index, reason = bad.first
        warn(f"{table.name}: left out, bad rows: {bad.count}; the first is {table.place(index)}: {reason}.")


def reward_examples(
    reader: TokenRewardReader, examples: Iterator[tuple[int, Preference | Answer]], rows_at_once: int = 128
) -> Iterator[list[tuple[int, RewardedResponse | RewardedPair]]]:
    """The rewards of what :func:`load_examples` gives, in its order.

    Args:
        reader: asks the roles.
        examples: rows with their numbers.
        rows_at_once: rows of a part, which are sorted by length before they are read.

    Yields:
        Part by part, the rewarded rows with their numbers.
    """
    while part := list(islice(examples, rows_at_once)):
        indices = [index for index, _ in part]
        yield list(zip(indices, _reward(reader, [example for _, example in part]), strict=True))


def _reward(
    reader: TokenRewardReader, examples: Sequence[Preference | Answer]
) -> Sequence[RewardedResponse | RewardedPair]:
    pairs = [example for example in examples if isinstance(example, Preference)]
    if pairs:
        return reader.pairs(pairs)
    answers = [example for example in examples if isinstance(example, Answer)]
    return reader.responses(
        [answer.prompt for answer in answers],
        [answer.response for answer in answers],
        [answer.truncated for answer in answers],
    )
