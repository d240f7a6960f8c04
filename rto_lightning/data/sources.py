"""Rows from files, a folder or the hub, named by one string: `NAME_OR_PATH[:SPLIT]`.

    data/pairs.jsonl                                      also .json, .csv, .parquet
    data/shards/*.jsonl                                   files that match, in the order of their names
    data/shards                                           a folder with files of one of these kinds
    data/pairs                                            a folder written by `datasets.save_to_disk`
    HuggingFaceH4/ultrafeedback_binarized:train_prefs     a data set of the Hugging Face hub

Rows are read one after another and never held all at once; only a .json file is, which is one list. A row that cannot
be read stands as a `BadRow` among the others.

Nothing is known here about what the columns mean; `formats.py` finds that out. Code that comes with a data
set is never run.
"""

import glob
import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets

from rto_lightning.data.files import READERS, BadRow, RawRow, arrow_rows, read_file, reason_of
from rto_lightning.errors import UserError

_ROWS_FOR_COLUMNS = 1000
"""Rows whose keys are the columns of a table: to take those of all, everything would have to be read twice."""
_ROWS_OF_STREAM = 100
"""Rows of a data set of the hub that are read at once, while it is downloaded."""
_FILES_OF_SAVED_DATA = ("state.json", "dataset_dict.json")
"""Either tells a folder that `datasets.save_to_disk` wrote."""


@dataclass(frozen=True)
class Table:
    """Rows with the name they came from."""

    name: str
    """The source as the user wrote it, for errors."""
    columns: list[str]
    """Every key that occurs in the first rows that can be read, in the order of first appearance."""
    rows: Iterable[RawRow]
    """At least one, read anew each time they are iterated over. A row need not have every column."""
    files: tuple[Path, ...] = ()
    """Those that the rows are in, one after another; none for a data set."""
    fingerprint: str = ""
    """Changes whenever the rows may have changed; empty where that cannot be known."""

    def place(self, index: int) -> str:
        """Where row `index` (from 0) is, as a user would look it up: `Row 5 of data/shards/2.jsonl`."""
        with suppress(UserError):  # the files may have changed
            places = ((number, path) for path in self.files for number, _ in read_file(path))
            for number, path in islice(() if self.changed else places, index, index + 1):
                return f"Row {number} of {path}"
        return f"Row {index + 1} of {self.name}"

    @property
    def changed(self) -> bool:
        """Whether a file was written to, or has gone, since the table was opened."""
        return bool(self.files) and self.fingerprint != _state_of(self.files)


@dataclass(frozen=True)
class _Origin:
    """What a source leads to."""

    read: Callable[[], Iterator[RawRow]]
    files: tuple[Path, ...] = ()
    fingerprint: str = ""


@dataclass(frozen=True)
class _FirstRows(Iterable[RawRow]):
    """The first rows of an origin, for any number of passes; picklable, for the processes of a loader."""

    read: Callable[[], Iterator[RawRow]]
    count: int | None

    def __iter__(self) -> Iterator[RawRow]:
        return islice(self.read(), self.count)


def load_table(source: str, max_rows: int | None = None, streaming: bool = False) -> Table:
    """Opens a source and reads the first of its rows.

    Args:
        source: Files, a folder or the name of a data set, with `:SPLIT` behind the latter two where needed.
        max_rows: Only the first this many rows; None for all.
        streaming: Read a data set of the hub while it is downloaded, instead of downloading it first.

    Raises:
        UserError: If the source does not exist, cannot be read, or has no row that can.
    """
    try:
        origin = _open(source, streaming)
    except (OSError, RuntimeError) as error:  # RuntimeError: the ~ of an unknown user
        raise UserError(f"{source[:200]!r} cannot be read ({reason_of(error)}); correct the path.") from error
    rows = _FirstRows(origin.read, max_rows)
    readable = (row for row in rows if not isinstance(row, BadRow))
    columns = list(dict.fromkeys(key for row in islice(readable, _ROWS_FOR_COLUMNS) for key in row))
    table = Table(source, columns, rows, origin.files, origin.fingerprint)
    if not columns:
        _check_rows(table)
    return table


def _open(source: str, streaming: bool) -> _Origin:
    paths, split = _find_paths(source)
    if not paths:
        return _open_hub(source.partition(":")[0], split, streaming)
    if len(paths) == 1 and paths[0].is_dir():
        return _open_folder(paths[0], split)
    if split is not None:
        raise UserError(f"{paths[0]} is a file and has no splits; leave out `:{split}`.")
    return _open_files(paths)


def _check_rows(table: Table) -> None:
    """Tells why a table has no columns, unless its rows are empty objects."""
    first = next(iter(table.rows), None)
    if first is None:
        raise UserError(f"{table.name} has no rows; give a source with at least one.")
    if isinstance(first, BadRow):
        raise UserError(f"{table.name} has no row that can be read: {table.place(0)}: {first}; correct the file.")


def _find_paths(source: str) -> tuple[list[Path], str | None]:
    """The local paths that a source names, or none if it names a data set of the hub; and the split."""
    whole = Path(source).expanduser()
    if source and whole.exists():
        return [whole], None
    if glob.has_magic(source):
        matching = sorted(Path(path) for path in glob.glob(str(whole), recursive=True))
        if matching:
            return matching, None
    name, _, split = source.partition(":")
    path = Path(name).expanduser()
    if name and path.exists():
        return [path], split or None
    if name.startswith(("/", ".", "~")) or path.suffix in READERS or name.count("/") > 1 or not name:
        raise UserError(
            f"There is no file or folder {name or source!r}; correct the path (a relative one starts at {Path.cwd()})."
        )
    return [], split or None


def _open_files(paths: list[Path]) -> _Origin:
    if not all(path.is_file() for path in paths):
        other = next(path for path in paths if not path.is_file())
        raise UserError(f"{other} is not a file that can be read again and again; name files, or one folder.")
    extensions = sorted({path.suffix for path in paths})
    if len(extensions) > 1:
        raise UserError(
            f"{paths[0].parent} has files with the extensions {', '.join(extensions)}; name those of one, such as "
            f"`{paths[0].parent}/*{next(filter(READERS.get, extensions), '.jsonl')}`."
        )
    if extensions[0] not in READERS:
        known = ", ".join(READERS)
        raise UserError(f"{paths[0]} has the unknown extension {extensions[0]!r}; give a file with one of {known}.")
    files = tuple(paths)
    return _Origin(partial(_read_files, files), files, _state_of(files))


def _state_of(paths: tuple[Path, ...]) -> str:
    """Of files: their names, sizes and times; empty if one has gone."""
    try:
        states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    except OSError:
        return ""
    return hashlib.sha256(repr(states).encode()).hexdigest()


def _read_files(paths: tuple[Path, ...]) -> Iterator[RawRow]:
    for path in paths:
        for _, row in read_file(path):
            yield row


def _open_folder(path: Path, split: str | None) -> _Origin:
    if not any((path / name).exists() for name in _FILES_OF_SAVED_DATA):
        files = sorted(file for file in path.iterdir() if file.suffix in READERS)
        if files and split is None:
            return _open_files(files)
        raise UserError(f"{path} is a folder that datasets.save_to_disk did not write; name one of its files instead.")
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # the library documents none for damaged files
        raise UserError(f"{path} is damaged ({reason_of(error)}); save the data set again.") from error
    if split is not None and isinstance(loaded, datasets.Dataset):
        raise UserError(f"{path} holds one data set without splits; leave out `:{split}`.")
    return _open_split(str(path), loaded, split)


def _open_hub(name: str, split: str | None, streaming: bool) -> _Origin:
    settings = {"streaming": True} if streaming else {}
    try:
        loaded = datasets.load_dataset(name, split=split, **settings)
    except Exception as error:  # the library documents none; network, name, split and file errors all end here
        of_split = f"split {split!r} of " if split else ""
        raise UserError(
            f"{name!r} is no file or folder here, and {of_split}the data set of that name cannot be loaded "
            f"from the Hugging Face hub ({reason_of(error)}); correct the name."
        ) from error
    return _open_split(name, loaded, split)


def _open_split(name: str, loaded: Any, split: str | None) -> _Origin:
    """The rows of a data set, or of one split of several."""
    if isinstance(loaded, dict):
        splits = list(loaded)
        if split is None and len(splits) != 1:
            raise UserError(f"{name} has the splits {', '.join(splits)}; write one as `{name}:{splits[0]}`.")
        if split is not None and split not in splits:
            raise UserError(f"{name} has no split {split!r}; write one of {', '.join(splits)}.")
        loaded = loaded[split or splits[0]]
    if isinstance(loaded, datasets.IterableDataset):
        return _Origin(partial(_read_whole, name, partial(_read_stream, loaded)))
    read = partial(_read_whole, name, partial(_read_data_set, loaded))
    return _Origin(read, fingerprint=loaded._fingerprint)


def _read_whole(name: str, read: Callable[[], Iterator[RawRow]]) -> Iterator[RawRow]:
    """All rows of a data set, with an error that tells how far it went."""
    count = 0
    try:
        for row in read():
            yield row
            count += 1
    except Exception as error:  # of the network, and of damaged files; the library documents none
        raise UserError(f"{name} cannot be read beyond row {count} ({reason_of(error)}); try again.") from error


def _read_data_set(data: datasets.Dataset) -> Iterator[RawRow]:
    for table in data.with_format("arrow").iter(batch_size=_ROWS_FOR_COLUMNS):
        yield from arrow_rows(table)


def _read_stream(data: datasets.IterableDataset) -> Iterator[RawRow]:
    # Not by iter(data), which in a process of a DataLoader leaves out what it thinks is other processes' share.
    for columns in data.iter(batch_size=_ROWS_OF_STREAM):
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))
