import pickle
from array import array

import pyarrow as pa
import pytest
from datasets.table import InMemoryTable, MemoryMappedTable
from hypothesis import given
from hypothesis import strategies as st

from rto_lightning.data.demonstrations import DemonstrationRow
from rto_lightning.data.preferences import PreferenceRow
from rto_lightning.data.prompts import PromptRow
from rto_lightning.data.rows import TokenizedRows, row_schema, to_arrow

int64 = st.integers(0, 2**63 - 1)
ids = st.lists(st.integers(0, 2**31 - 1), max_size=9).map(lambda row: array("i", row))
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
messages = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]), "content": text}), max_size=3)
KINDS = {
    PromptRow: st.builds(PromptRow, int64, ids, messages),
    PreferenceRow: st.builds(PreferenceRow, int64, ids, ids, ids, st.tuples(int64, int64), int64),
    DemonstrationRow: st.builds(DemonstrationRow, int64, ids, ids),
}


def table_of(kind, rows, size=2):
    """Rows in record batches of a size."""
    parts = [to_arrow(kind, rows[start : start + size]) for start in range(0, len(rows), size)]
    return pa.Table.from_batches(parts, schema=row_schema(kind))


@given(st.data())
def test_rows_come_back_as_they_were(data):
    kind = data.draw(st.sampled_from(list(KINDS)))
    rows = data.draw(st.lists(KINDS[kind], min_size=1, max_size=7))
    stored = TokenizedRows(InMemoryTable(table_of(kind, rows)), kind)
    assert list(stored) == [stored[position] for position in range(len(stored))] == rows
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=9))
    assert stored.__getitems__(chosen) == [rows[position] for position in chosen]
    assert (stored[-1], stored[1:-1], stored[::-2]) == (rows[-1], rows[1:-1], rows[::-2])
    with pytest.raises(IndexError):
        stored[len(rows)]


def test_a_file_is_mapped_and_not_sent_along(tmp_path):
    rows = [DemonstrationRow(index, array("i", range(500)), array("i", [index])) for index in range(200)]
    table = table_of(DemonstrationRow, rows, size=50)
    path = str(tmp_path / "rows.arrow")
    with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    before = pa.total_allocated_bytes()
    stored = TokenizedRows(MemoryMappedTable.from_file(path), DemonstrationRow)
    assert pa.total_allocated_bytes() - before < table.nbytes / 10
    sent = pickle.dumps(stored)
    assert len(sent) < table.nbytes / 10
    assert list(pickle.loads(sent)) == rows
