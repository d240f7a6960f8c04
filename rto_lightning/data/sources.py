"""Rows from a file, a folder or the hub, named by one string: `NAME_OR_PATH[:SPLIT]`.

    data/pairs.jsonl                                      also .json, .csv, .parquet
    data/pairs                                            a folder written by `datasets.save_to_disk`
    HuggingFaceH4/ultrafeedback_binarized:train_prefs     a data set of the Hugging Face hub

Nothing is known here about what the columns mean; `formats.py` finds that out. Code that comes with a data
set is never run.
"""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet  # type: ignore[import-untyped]

from rto_lightning.errors import UserError

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows with the name they came from."""

    name: str
    """The source as the user wrote it, for errors."""
    columns: list[str]
    """Every key that occurs, in the order of first appearance."""
    rows: list[Row]
    """At least one. A row need not have every column."""


def load_table(source: str, max_rows: int | None = None) -> Table:
    """Loads a source.

    Args:
        source: A file, a folder or the name of a data set, with `:SPLIT` behind the latter two where needed.
        max_rows: Only the first this many rows; None for all.

    Raises:
        UserError: If the source does not exist, cannot be read, or has no rows.
    """
    path, split = _find_path(source)
    if path is None:
        rows = _read_hub(source.partition(":")[0], split, max_rows)
    elif path.is_dir():
        rows = _read_folder(path, split, max_rows)
    elif split is not None:
        raise UserError(f"{path} is a file and has no splits; leave out `:{split}`.")
    else:
        rows = _read_file(path, max_rows)
    if not rows:
        raise UserError(f"{source} has no rows; give a source with at least one.")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return Table(source, columns, rows)


def _find_path(source: str) -> tuple[Path | None, str | None]:
    """The local path that a source names, or None if it names a data set of the hub; and the split."""
    whole = Path(source).expanduser()
    if source and whole.exists():
        return whole, None
    name, _, split = source.partition(":")
    path = Path(name).expanduser()
    if name and path.exists():
        return path, split or None
    if name.startswith(("/", ".", "~")) or path.suffix in _READERS or name.count("/") > 1 or not name:
        raise UserError(
            f"There is no file or folder {name or source!r}; correct the path (a relative one starts at {Path.cwd()})."
        )
    return None, split or None


def _read_file(path: Path, max_rows: int | None) -> list[Row]:
    reader = _READERS.get(path.suffix)
    if reader is None:
        known = ", ".join(_READERS)
        raise UserError(f"{path} has the unknown extension {path.suffix!r}; give a file with one of {known}.")
    try:
        return list(islice(reader(path), max_rows))
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
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
        yield from batch.to_pylist()


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _read_folder(path: Path, split: str | None, max_rows: int | None) -> list[Row]:
    try:
        loaded = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is a folder that datasets.save_to_disk did not write; name one of its files instead."
        ) from error
    if split is not None and isinstance(loaded, datasets.Dataset):
        raise UserError(f"{path} holds one data set without splits; leave out `:{split}`.")
    return _rows_of_split(str(path), loaded, split, max_rows)


def _read_hub(name: str, split: str | None, max_rows: int | None) -> list[Row]:
    try:
        loaded = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library documents none; network, name, split and file errors all end here
        of_split = f"split {split!r} of " if split else ""
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{name!r} is no file or folder here, and {of_split}the data set of that name cannot be loaded "
            f"from the Hugging Face hub ({reason}); correct the name."
        ) from error
    return _rows_of_split(name, loaded, split, max_rows)


def _rows_of_split(name: str, loaded: Any, split: str | None, max_rows: int | None) -> list[Row]:
    """The rows of a `datasets.Dataset`, or of one split of a `DatasetDict`."""
    if isinstance(loaded, dict):
        splits = list(loaded)
        if split is None and len(splits) != 1:
            raise UserError(f"{name} has the splits {', '.join(splits)}; write one as `{name}:{splits[0]}`.")
        if split is not None and split not in splits:
            raise UserError(f"{name} has no split {split!r}; write one of {', '.join(splits)}.")
        loaded = loaded[split or splits[0]]
    if max_rows is not None:
        loaded = loaded.select(range(min(max_rows, len(loaded))))
    rows: list[Row] = loaded.to_list()
    return rows
