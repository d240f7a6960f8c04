"""Rows from one file, read one after another, with errors that name the file and the row."""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet  # type: ignore[import-untyped]

from rto_lightning.errors import UserError

Row = dict[str, Any]

_PARQUET_ROWS = 1000


def read_file(path: Path) -> Iterator[Row]:
    """The rows of a file whose extension is one of `READERS`.

    Raises:
        UserError: If the file, or the row that was asked for, cannot be read.
    """
    try:
        yield from READERS[path.suffix](path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); convert it.") from error
    except (OSError, csv.Error, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({error}); check the file.") from error


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"Row {number} of {path} is not JSON ({error}); write one JSON object a line."
                ) from error
            if not isinstance(row, dict):
                raise UserError(f"Row {number} of {path} is not a JSON object; write one JSON object a line.")
            yield row


def _read_json(path: Path) -> Iterator[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not JSON ({error}); name it .jsonl if it has one object a line, else correct it."
        ) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} is not a JSON list of objects; make it one.")
    yield from rows


def _read_csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file):
            row.pop(None, None)  # cells beyond the header
            yield row


def _read_parquet(path: Path) -> Iterator[Row]:
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(_PARQUET_ROWS):
            yield from batch.to_pylist()


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
"""What reads the files of each extension."""
