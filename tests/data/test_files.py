"""Rows of files that are broken in every way that is known."""

import csv
import io
import json
import pickle
import tracemalloc

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rto_lightning.data import files
from rto_lightning.data.files import BadRow, read_file
from rto_lightning.errors import UserError

GOOD = b'{"prompt": "Hi"}'
on_one_file = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(path, content):
    """The rows of a file of such bytes by their number; of those that cannot be read, why."""
    path.write_bytes(content)
    return {number: str(row) if isinstance(row, BadRow) else row for number, row in read_file(path)}


LINES = {
    "cut": (b'{"prompt": "H', "it is not JSON (Unterminated string starting at, character 12)"),
    "text": (b"Hi", "it is not JSON (Expecting value, character 1)"),
    "two objects": (b"{}{}", "it is not JSON (Extra data, character 3)"),
    "a list": (b"[1]", "it is not a JSON object"),
    "null": (b"null", "it is not a JSON object"),
    "raw control character": (b'{"prompt": "\x01"}', "it is not JSON (Invalid control character at, character 13)"),
    "NUL": (b"\0\0\0", "it is not JSON (Expecting value, character 1)"),
    "latin-1": ('{"prompt": "é"}'.encode("latin-1"), "it is not UTF-8 text (character 13)"),
    "UTF-16 within": ('{"prompt": "Hi"}'.encode("utf-16-le"), "it is not JSON (Expecting property name enclosed"),
    "a number without an end": (b'{"n": ' + b"1" * 5000 + b"}", "it cannot be read (Exceeds the limit (4300 digits)"),
    "deep": (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "it has more than 100 lists and objects in each other"),
    "deeper than Python goes": (b"[" * 9999, "it has more than 100 lists and objects in each other"),
}


class TestLines:
    @pytest.mark.parametrize("line, reason", LINES.values(), ids=LINES)
    def test_those_that_cannot_be_read_stand_among_the_others(self, tmp_path, line, reason):
        rows = read(tmp_path / "a.jsonl", b"\n".join([GOOD, b"", line, GOOD]))
        assert rows.pop(3).startswith(reason)
        assert rows == {1: {"prompt": "Hi"}, 4: {"prompt": "Hi"}}

    def test_what_is_no_fault(self, tmp_path):
        lines = [b"\xef\xbb\xbf" + GOOD + b"\r", b" ", b"\r", b"\xef\xbb\xbf" + GOOD, b'{"score": NaN}']
        rows = read(tmp_path / "a.jsonl", b"\n".join(lines))
        assert list(rows) == [1, 4, 5]
        assert rows[1] == rows[4] == {"prompt": "Hi"}

    @pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
    def test_long_ones_are_passed_over(self, tmp_path, monkeypatch, end):
        monkeypatch.setattr(files, "MOST_CHARACTERS", len(GOOD))
        rows = read(tmp_path / "a.jsonl", GOOD + b"\n" + GOOD + b" \n" + GOOD * 99 + b"\n" + GOOD + end)
        long = f"it is longer than {len(GOOD)} characters"
        assert rows == {1: {"prompt": "Hi"}, 2: long, 3: long, 4: {"prompt": "Hi"}}

    def test_a_huge_one_takes_little_memory(self, tmp_path):
        path = tmp_path / "a.jsonl"
        with path.open("wb") as file:
            file.write(GOOD + b"\n{")
            file.truncate(256 * 2**20)  # sparse: zeros that take no disk
            file.seek(0, io.SEEK_END)
            file.write(b"\n" + GOOD)
        tracemalloc.start()
        rows = dict(read_file(path))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert isinstance(rows.pop(2), BadRow)
        assert rows == {1: {"prompt": "Hi"}, 3: {"prompt": "Hi"}}
        assert peak < 64 * 2**20

    @on_one_file
    @given(st.lists(st.binary(max_size=30).map(lambda line: line.replace(b"\n", b"").replace(b"\r", b"")), max_size=6))
    def test_whatever_stands_between_two_rows_they_are_read(self, tmp_path, lines):
        rows = read(tmp_path / "a.jsonl", b"\n".join([GOOD, *lines, GOOD]))
        assert rows[1] == rows[len(lines) + 2] == {"prompt": "Hi"}
        assert set(rows) <= set(range(1, len(lines) + 3))

    def test_bad_rows_go_to_other_processes(self, tmp_path):
        (tmp_path / "a.jsonl").write_bytes(b"null\n")
        [(_, row)] = read_file(tmp_path / "a.jsonl")
        assert str(pickle.loads(pickle.dumps(row))) == str(row)


class TestJson:
    def test_items_that_are_no_objects(self, tmp_path):
        rows = read(tmp_path / "a.json", json.dumps([1, {"a": 1}, {"a": [[]]}, None]).encode())
        assert rows == {1: "it is not a JSON object", 2: {"a": 1}, 3: {"a": [[]]}, 4: "it is not a JSON object"}

    def test_a_large_one_is_not_held(self, tmp_path, monkeypatch):
        monkeypatch.setattr(files, "MOST_JSON_BYTES", 2**10)
        with pytest.raises(UserError, match=r"a\.json is larger than .* GiB and would be held whole; write it"):
            read(tmp_path / "a.json", b"[" + b" " * 2**10 + b"]")


class TestCsv:
    @on_one_file
    @given(
        st.lists(st.fixed_dictionaries({"a": st.text(max_size=9), "b": st.text(min_size=1, max_size=9)}), max_size=4)
    )
    def test_what_was_written_is_read(self, tmp_path, rows):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, ["a", "b"], quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
        assert read(tmp_path / "a.csv", text.getvalue().encode()) == dict(enumerate(rows, start=1))

    @pytest.mark.parametrize(
        "line, reason",
        [
            (b"1,2,3", "it has more cells than the header; quote text with commas"),
            ("é,2".encode("latin-1"), "it is not UTF-8 text"),
        ],
    )
    def test_rows_that_stand_among_the_others(self, tmp_path, line, reason):
        rows = read(tmp_path / "a.csv", b"a,b\n1,2\n\n" + line + b"\n5,6,,\n7\n")
        assert rows.pop(2) == reason
        assert rows == {1: {"a": "1", "b": "2"}, 3: {"a": "5", "b": "6"}, 4: {"a": "7", "b": None}}

    @pytest.mark.parametrize(
        "content, message",
        [
            (
                b'a,b\n1,2\n"3,4\n5,6\n',
                r"Row 2 of .*a\.csv, from line 3 on, is not CSV \(unexpected end of data\); close",
            ),
            (b'a,b\n1,2\n"3"3,4\n', r"Row 2 of .*a\.csv, from line 3 on, is not CSV \(',' expected after '\"'\)"),
            (b'a,b\n"' + b"x\n" * 99 + b'",1\n', r"Row 1 of .*, is not CSV \(field larger than field limit \(40\)"),
            (b"a,b\n" + b"x" * 99 + b"\n", r"Line 2 of .*a\.csv is longer than 40 characters"),
            (b"a,a\n1,2\n", r"a\.csv has two columns of one name"),
        ],
    )
    def test_what_cannot_be_read_any_further(self, tmp_path, monkeypatch, content, message):
        monkeypatch.setattr(files, "MOST_CHARACTERS", 40)
        with pytest.raises(UserError, match=message):
            read(tmp_path / "a.csv", content)


class TestArrow:
    def test_text_that_is_not_utf8_is_one_bad_row(self, tmp_path):
        offsets, text = pa.array([0, 1, 2, 3], pa.int32()).buffers()[1], pa.py_buffer(b"a\xffb")
        pyarrow.parquet.write_table(
            pa.table({"prompt": pa.Array.from_buffers(pa.string(), 3, [None, offsets, text])}), tmp_path / "a.parquet"
        )
        [first, bad, last] = [row for _, row in read_file(tmp_path / "a.parquet")]
        assert (first, last) == ({"prompt": "a"}, {"prompt": "b"})
        assert str(bad).startswith("it cannot be read ('utf-8' codec can't decode byte 0xff")

    @pytest.mark.parametrize("kept", [0, 4, 100, -1])
    def test_a_cut_file(self, tmp_path, kept):
        path = tmp_path / "a.parquet"
        pyarrow.parquet.write_table(pa.table({"prompt": ["Hi"] * 1000}), path)
        with pytest.raises(UserError, match=r"a\.parquet cannot be read \(.*\); check the file\."):
            read(path, path.read_bytes()[:kept])


OTHER_FORMATS = {
    "UTF-16 or UTF-32 text": GOOD.decode().encode("utf-16"),
    "UTF-16 text": b"\xfe\xff" + GOOD.decode().encode("utf-16-be"),
    "UTF-32 text": b"\0\0\xfe\xff" + GOOD.decode().encode("utf-32-be"),
    "compressed by gzip": b"\x1f\x8b\x08\0",
    "a zip archive": b"PK\x03\x04",
    "a Parquet file": b"PAR1",
}


@pytest.mark.parametrize("extension", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("found", OTHER_FORMATS)
def test_what_is_no_utf8_text_is_told_by_its_first_bytes(tmp_path, extension, found):
    with pytest.raises(UserError, match=rf"a\.{extension} is {found} and not UTF-8 text; unpack, convert or rename it"):
        read(tmp_path / f"a.{extension}", OTHER_FORMATS[found])
