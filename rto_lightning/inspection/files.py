"""Token rewards as rows of a JSONL or Parquet file, one for each response, written while they are computed."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]

from rto_lightning.inspection.responses import RewardedPair, RewardedResponse
from rto_lightning.runs.files import written_whole

_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("answer", pa.string()),
        ("prompt", pa.list_(_MESSAGE)),
        ("response", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("tokens", pa.list_(pa.string())),
        ("special", pa.list_(pa.bool_())),
        ("rewards", pa.list_(pa.float64())),
        ("cumulative", pa.list_(pa.float64())),
        ("sum", pa.float64()),
        ("sentence_ends", pa.list_(pa.bool_())),
        ("score", pa.float64()),
    ]
)
"""The columns. `answer` is `chosen`, `rejected`, or `response` for one that is not of a pair."""


def reward_rows(index: int, item: RewardedResponse | RewardedPair) -> list[dict[str, Any]]:
    """The rows of a response, or of the two of a pair.

    Args:
        index: of the row that it comes from.
        item: a response or a pair.
    """
    answers = {"response": item} if isinstance(item, RewardedResponse) else vars(item)
    return [{"index": index, "answer": name, **response.row()} for name, response in answers.items()]


class RewardFile:
    """A file of rewards, which is there once all is written; a context manager.

    Args:
        path: ends with `.jsonl` or `.parquet`.

    Raises:
        UserError: if there is no room for it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._parquet = path.suffix == ".parquet"
        self._opened = ExitStack()
        self._file: Any

    def __enter__(self) -> "RewardFile":
        text = {} if self._parquet else {"encoding": "utf-8"}
        self._file = self._opened.enter_context(written_whole(self.path, "wb" if self._parquet else "w", **text))
        if self._parquet:
            self._file = self._opened.enter_context(pa.parquet.ParquetWriter(self._file, SCHEMA))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, trace)

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add rows."""
        if self._parquet:
            self._file.write_table(pa.Table.from_pylist(list(rows), SCHEMA))
        else:
            self._file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
