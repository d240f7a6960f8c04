"""Rows from one file, read one after another, with errors that name the file and the row.

Where a row cannot be read but those behind it can, such as a line that is no JSON, a `BadRow` stands in its place. A
file that cannot be read any further is a `UserError`. No line, however long, is held whole: see `MOST_CHARACTERS`.
"""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]

from rto_lightning.errors import UserError

MOST_CHARACTERS = 4 * 2**20
"""A longer line, CSV cell or text of a row is bad: to tokenize it would take gigabytes."""
MOST_LEVELS = 100
"""Lists and objects of JSON in each other. More than some hundreds cannot be sent to other processes."""
MOST_JSON_BYTES = 2 * 2**30
"""A larger .json file is refused, since it would have to be held whole."""

_PARQUET_ROWS = 1000
_BYTES_OF_OTHER_FORMATS = {
    b"\xff\xfe": "UTF-16 or UTF-32 text",
    b"\xfe\xff": "UTF-16 text",
    b"\x00\x00\xfe\xff": "UTF-32 text",
    b"\x1f\x8b": "compressed by gzip",
    b"PK\x03\x04": "a zip archive",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ\x00": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by Zstandard",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
}


class BadRow(ValueError):
    """Why a row cannot be used; a clause without its row and file."""


Row = dict[str, Any]
RawRow = Row | BadRow


def read_file(path: Path) -> Iterator[tuple[int, RawRow]]:
    """The rows of a file whose extension is one of `READERS`, each with its number from 1: in .jsonl that of its line.

    Raises:
        UserError: If the file cannot be read, or not beyond the rows that came so far.
    """
    try:
        yield from READERS[path.suffix](path)
    except (OSError, ValueError, RecursionError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({reason_of(error)}); check the file.") from error


def arrow_rows(batch: pa.RecordBatch | pa.Table) -> Iterator[RawRow]:
    """The rows of a part of an Arrow table."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):  # text that is not UTF-8, or a date that Python cannot hold
        rows = [_arrow_row(batch.slice(index, 1)) for index in range(batch.num_rows)]
    yield from rows


def reason_of(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _arrow_row(row: pa.RecordBatch | pa.Table) -> RawRow:
    try:
        first: Row = row.to_pylist()[0]
        return first
    except (ValueError, OverflowError, pa.ArrowException) as error:
        return BadRow(f"it cannot be read ({reason_of(error)})")


# The formats.


def _read_jsonl(path: Path) -> Iterator[tuple[int, RawRow]]:
    for number, line in enumerate(_lines(path), start=1):
        if line is None:
            yield number, BadRow(f"it is longer than {MOST_CHARACTERS} characters")
        elif line := line.removeprefix("\ufeff").strip():  # files that were put together have marks within
            yield number, _parse(line)


def _parse(line: str) -> RawRow:
    try:
        line.encode()
        return _object(json.loads(line))
    except UnicodeEncodeError as error:
        return BadRow(f"it is not UTF-8 text (character {error.start + 1})")
    except json.JSONDecodeError as error:
        return BadRow(f"it is not JSON ({error.msg}, character {error.pos + 1})")
    except RecursionError:
        return _too_deep()
    except ValueError as error:  # a number of more digits than Python reads
        return BadRow(f"it cannot be read ({reason_of(error)})")


def _read_json(path: Path) -> Iterator[tuple[int, RawRow]]:
    _check_text(path)
    if path.stat().st_size > MOST_JSON_BYTES:
        raise UserError(
            f"{path} is larger than {MOST_JSON_BYTES / 2**30:g} GiB and would be held whole; write it as .jsonl."
        )
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); convert it.") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not JSON ({error}); name it .jsonl if it has one object a line, else correct it."
        ) from error
    if not isinstance(rows, list):
        raise UserError(f"{path} is not a JSON list of objects; make it one.")
    yield from ((number, _object(row)) for number, row in enumerate(rows, start=1))


def _object(value: Any) -> RawRow:
    if not isinstance(value, dict):
        return BadRow("it is not a JSON object")
    level: list[Any] = [value]
    for _ in range(MOST_LEVELS):
        inner = (child for node in level for child in (node.values() if isinstance(node, dict) else node))
        level = [child for child in inner if isinstance(child, dict | list)]
        if not level:
            return value
    return _too_deep()


def _too_deep() -> BadRow:
    return BadRow(f"it has more than {MOST_LEVELS} lists and objects in each other")


def _read_csv(path: Path) -> Iterator[tuple[int, RawRow]]:
    csv.field_size_limit(MOST_CHARACTERS)  # of the process; the library's own limit is 131,072
    # Strict, since of a quote that is not closed the library otherwise makes one row of all that follow.
    reader = csv.DictReader(_csv_lines(path), strict=True)
    number = 0
    try:
        names = [name for name in reader.fieldnames or () if name]
        if len(set(names)) < len(names):
            raise UserError(f"{path} has two columns of one name; rename one.")
        for number, row in enumerate(reader, start=1):
            yield number, _cells(row)
    except csv.Error as error:
        raise UserError(
            f"Row {number + 1} of {path}, from line {reader.line_num + 1} on, is not CSV ({error}); close each quote, "
            'and write a quote within quoted text as "".'
        ) from error


def _csv_lines(path: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(path, newline=""), start=1):
        if line is None:
            raise UserError(f"Line {number} of {path} is longer than {MOST_CHARACTERS} characters; check the file.")
        yield line


def _cells(row: dict[Any, Any]) -> RawRow:
    if any(row.pop(None, ())):
        return BadRow("it has more cells than the header; quote text with commas")
    try:
        "".join(cell for cell in row.values() if cell).encode()
    except UnicodeEncodeError:
        return BadRow("it is not UTF-8 text")
    return row


def _read_parquet(path: Path) -> Iterator[tuple[int, RawRow]]:
    with pyarrow.parquet.ParquetFile(path) as file:
        batches = file.iter_batches(_PARQUET_ROWS)
        yield from enumerate((row for batch in batches for row in arrow_rows(batch)), start=1)


READERS: dict[str, Callable[[Path], Iterator[tuple[int, RawRow]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
"""What reads the files of each extension."""


# Text.


def _lines(path: Path, newline: str | None = None) -> Iterator[str | None]:
    """The lines of a text; None for one that is too long. Bytes that are not UTF-8 become lone surrogates."""
    _check_text(path)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline) as file:
        while line := file.readline(MOST_CHARACTERS + 1):
            if len(line) <= MOST_CHARACTERS or line[-1] in "\r\n":
                yield line
            else:
                while line and line[-1] not in "\r\n":
                    line = file.readline(2**20)
                yield None


def _check_text(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(8)
    for first_bytes, found in _BYTES_OF_OTHER_FORMATS.items():
        if start.startswith(first_bytes):
            raise UserError(f"{path} is {found} and not UTF-8 text; unpack, convert or rename it.")
