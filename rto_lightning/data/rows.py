"""Tokenized rows in an Arrow table, which is in memory or in a file that is mapped into it.

A kind of row is a frozen dataclass; its fields are the columns, typed by `ARROW_TYPES`. Rows are made when they are
asked for, so that a set takes the memory of its pages in use and not of its rows.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar, overload

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from datasets.table import Table

from rto_lightning.backbone.chat import Message

RowT = TypeVar("RowT")

if TYPE_CHECKING:
    TokenIds: TypeAlias = array[int]
    """Token ids of four bytes each, by type code `i`."""
else:
    TokenIds = array  # which takes no type argument before Python 3.12

ARROW_TYPES: dict[Any, pa.DataType] = {
    int: pa.int64(),
    array: pa.list_(pa.int32()),
    tuple[int, int]: pa.list_(pa.int64(), 2),
    list[Message]: pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
}
"""How each type that a field of a row may have is stored. An `array` has type code `i`: token ids of four bytes."""

_ROWS_AT_ONCE = 1000


def row_schema(kind: type[Any]) -> pa.Schema:
    """The columns that rows of a kind are stored in."""
    return pa.schema([(field.name, ARROW_TYPES[field.type]) for field in fields(kind)])


def to_arrow(kind: type[RowT], rows: Sequence[RowT]) -> pa.RecordBatch:
    """N rows of a kind as N rows of Arrow."""
    columns = []
    for field in fields(kind):  # type: ignore[arg-type]
        values = [getattr(row, field.name) for row in rows]
        if field.type is array:
            columns.append(_ids_to_arrow(values))
        else:
            columns.append(pa.array(values, ARROW_TYPES[field.type]))
    return pa.RecordBatch.from_arrays(columns, schema=row_schema(kind))


class TokenizedRows(Sequence[RowT], Generic[RowT]):
    """Rows of one kind, read from Arrow.

    Args:
        table: N rows with the columns of the kind.
        kind: The dataclass to make of each.
    """

    def __init__(self, table: Table, kind: type[RowT]) -> None:
        self.table = table
        self.kind = kind

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @overload
    def __getitem__(self, index: int) -> RowT: ...

    @overload
    def __getitem__(self, index: slice) -> list[RowT]: ...

    def __getitem__(self, index: int | slice) -> RowT | list[RowT]:
        if isinstance(index, slice):
            return self.__getitems__(range(len(self))[index])
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[RowT]:
        """The rows at N positions from 0; a DataLoader takes its batches so."""
        return self._rows(self.table.fast_gather(list(indices))) if len(indices) else []

    def __iter__(self) -> Iterator[RowT]:
        for start in range(0, len(self), _ROWS_AT_ONCE):
            yield from self._rows(self.table.fast_slice(start, min(_ROWS_AT_ONCE, len(self) - start)))

    def _rows(self, part: pa.Table) -> list[RowT]:
        columns: list[list[Any]] = []
        for field in fields(self.kind):  # type: ignore[arg-type]
            column = part[field.name].combine_chunks()
            if field.type is array:
                columns.append(_ids_from_arrow(column))
            elif field.type == tuple[int, int]:
                columns.append([tuple(pair) for pair in column.to_pylist()])
            else:
                columns.append(column.to_pylist())
        return [self.kind(*values) for values in zip(*columns, strict=True)]


def _ids_to_arrow(rows: Sequence[TokenIds]) -> pa.ListArray:
    """Through the buffers: element by element it takes a hundred times as long."""
    ends = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    ids = np.frombuffer(b"".join(row.tobytes() for row in rows), dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(ids))


def _ids_from_arrow(column: pa.ListArray) -> list[TokenIds]:
    ends = column.offsets.to_numpy()
    ids = column.values.to_numpy()
    return [array("i", ids[start:end].tobytes()) for start, end in pairwise(ends)]
