import csv
import json
import os

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from rto_lightning.data.sources import load_table
from rto_lightning.errors import UserError

ROWS = [{"prompt": "Hi", "chosen": "Hello\nyou"}, {"prompt": "é", "chosen": "42"}]


def write(path, rows=ROWS):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


@pytest.mark.parametrize("extension", ["jsonl", "json", "csv", "parquet"])
def test_files(tmp_path, extension):
    source = write(tmp_path / f"rows.{extension}")
    table = load_table(source)
    assert list(table.rows) == list(table.rows) == ROWS
    assert table.columns == ["prompt", "chosen"]
    assert table.name == source
    assert list(load_table(source, max_rows=1).rows) == ROWS[:1]
    assert list(load_table(source, max_rows=9).rows) == ROWS


def test_a_parquet_file_may_hold_message_lists(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "Hi"}]}]
    assert list(load_table(write(tmp_path / "rows.parquet", rows)).rows) == rows


def test_columns_are_those_of_any_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"b": 2}\n')
    assert load_table(str(path)).columns == ["a", "b"]


def test_rows_are_read_when_they_are_asked_for(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n' * 1000)
    rows = iter(load_table(str(path)).rows)
    path.unlink()
    with pytest.raises(UserError, match=r"rows\.jsonl cannot be read \(.*No such file"):
        next(rows)


class TestSeveralFiles:
    @pytest.fixture(params=[".jsonl", ".csv", ".parquet"])
    def shards(self, tmp_path, request):
        for name, rows in {"b": [{"n": "2"}], "a": [{"n": "0"}, {"n": "1"}], "c": [{"n": "3"}]}.items():
            write((tmp_path / name).with_suffix(request.param), rows)
        return tmp_path, request.param

    def test_a_pattern_or_their_folder(self, shards):
        folder, extension = shards
        (folder / "deeper").mkdir()
        for source in (f"{folder}/*{extension}", f"{folder}/[a-c]{extension}", str(folder)):
            table = load_table(source)
            assert [row["n"] for row in table.rows] == ["0", "1", "2", "3"], source
            assert (table.name, table.columns) == (source, ["n"])
        assert [row["n"] for row in load_table(f"{folder}/*{extension}", max_rows=3).rows] == ["0", "1", "2"]

    def test_a_row_is_told_by_its_file(self, shards):
        folder, extension = shards
        table = load_table(f"{folder}/*{extension}")
        places = [f"Row 1 of {folder / 'a'}", f"Row 2 of {folder / 'a'}", f"Row 1 of {folder / 'b'}"]
        assert [table.place(index) for index in range(3)] == [place + extension for place in places]
        assert load_table(f"{folder}/a{extension}").place(1) == f"Row 2 of {folder}/a{extension}"

    def test_a_row_is_told_though_the_file_has_changed(self, shards):
        folder, extension = shards
        source = f"{folder}/*{extension}"
        table = load_table(source)
        assert not table.changed
        (folder / "a").with_suffix(extension).unlink()
        assert table.changed
        assert table.place(3) == f"Row 4 of {source}"

    def test_a_folder_among_them_is_named(self, shards):
        folder, extension = shards
        (folder / f"d{extension}").mkdir()
        with pytest.raises(UserError, match=rf"d\{extension} is not a file that can be read again and again"):
            load_table(f"{folder}/*{extension}")

    def test_of_one_kind(self, tmp_path):
        write(tmp_path / "a.jsonl")
        write(tmp_path / "b.csv")
        for source in (f"{tmp_path}/*", str(tmp_path)):
            with pytest.raises(UserError, match=r"has files with the extensions \.csv, \.jsonl; name those of one"):
                load_table(source)

    def test_none(self, tmp_path):
        with pytest.raises(UserError, match=r"There is no file or folder '.*\*\.jsonl'"):
            load_table(f"{tmp_path}/*.jsonl")


class TestFingerprint:
    """What the cache of tokenized rows knows a source by."""

    @pytest.mark.parametrize("shards", [False, True])
    def test_of_files(self, tmp_path, shards):
        first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
        write(first)
        write(second)
        source = f"{tmp_path}/*.jsonl" if shards else str(second)
        before = load_table(source).fingerprint
        assert before and before == load_table(source, max_rows=1).fingerprint
        os.utime(second, (1, 1))
        touched = load_table(source).fingerprint
        write(second, ROWS[:1])
        os.utime(second, (1, 1))
        shorter = load_table(source).fingerprint
        assert len({before, touched, shorter, load_table(str(first)).fingerprint}) == 4

    def test_of_saved_data_sets(self, tmp_path):
        for name, rows in {"a": ROWS, "b": ROWS[:1]}.items():
            datasets.Dataset.from_list(rows).save_to_disk(tmp_path / name)
        a, again, b = (load_table(str(tmp_path / name)).fingerprint for name in "aab")
        assert a and a == again != b


class TestFolders:
    @pytest.fixture
    def data(self):
        return datasets.Dataset.from_list(ROWS)

    def test_one_data_set(self, tmp_path, data):
        data.save_to_disk(tmp_path / "saved")
        assert list(load_table(str(tmp_path / "saved"), max_rows=1).rows) == ROWS[:1]
        with pytest.raises(UserError, match="holds one data set without splits; leave out `:train`"):
            load_table(f"{tmp_path / 'saved'}:train")

    def test_splits(self, tmp_path, data):
        saved = tmp_path / "saved"
        datasets.DatasetDict(train=data, test=data.select([1])).save_to_disk(saved)
        assert list(load_table(f"{saved}:test").rows) == ROWS[1:]
        with pytest.raises(UserError, match=r"has the splits train, test; write one as `.*saved:train`"):
            load_table(str(saved))
        with pytest.raises(UserError, match="has no split 'dev'; write one of train, test"):
            load_table(f"{saved}:dev")

    def test_the_only_split_needs_no_name(self, tmp_path, data):
        datasets.DatasetDict(train=data).save_to_disk(tmp_path / "saved")
        assert list(load_table(str(tmp_path / "saved")).rows) == ROWS

    @pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
    @pytest.mark.parametrize("kept", [None, 0, 20])
    def test_damaged_ones_are_named(self, tmp_path, data, name, kept):
        saved = tmp_path / "saved"
        data.save_to_disk(saved)
        content = (saved / name).read_bytes()
        (saved / name).unlink()
        if kept is not None:
            (saved / name).write_bytes(content[:kept])
        elif name == "state.json":
            name = ""  # without it the folder is none that was saved
        with pytest.raises(UserError, match="is damaged|cannot be read beyond row 0" if name else "saved"):
            load_table(str(saved))

    def test_other_folders_are_refused(self, tmp_path):
        with pytest.raises(UserError, match=r"a folder that datasets\.save_to_disk did not write"):
            load_table(str(tmp_path))


class TestHub:
    @pytest.fixture
    def calls(self, monkeypatch):
        calls = []

        def load_dataset(name, **settings):
            calls.append((name, settings))
            if name == "org/none":
                raise datasets.exceptions.DatasetNotFoundError("no such\n data set")
            data = datasets.Dataset.from_list(ROWS)
            if settings.get("streaming"):
                return data.to_iterable_dataset()
            return datasets.DatasetDict(a=data, b=data) if settings["split"] is None else data

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    def test_a_name_with_a_split(self, calls):
        assert list(load_table("org/pairs:train[:50%]", max_rows=1).rows) == ROWS[:1]
        assert calls == [("org/pairs", {"split": "train[:50%]"})]  # never trust_remote_code

    def test_while_it_is_downloaded(self, calls):
        table = load_table("org/pairs:train", max_rows=1, streaming=True)
        assert (list(table.rows), table.columns, table.fingerprint) == (ROWS[:1], ["prompt", "chosen"], "")
        assert calls == [("org/pairs", {"split": "train", "streaming": True})]

    def test_a_download_that_breaks_off_tells_how_far_it_went(self, monkeypatch):
        class Broken(datasets.IterableDataset):
            def __init__(self):
                pass

            def iter(self, batch_size):
                yield {"prompt": ["Hi", "Ho"]}
                raise ConnectionError("reset\n by peer")

        monkeypatch.setattr(datasets, "load_dataset", lambda name, **settings: Broken())
        with pytest.raises(UserError, match=r"^org/pairs cannot be read beyond row 2 \(reset by peer\); try again\.$"):
            load_table("org/pairs:train", streaming=True)

    def test_a_name_without_one_lists_the_splits(self, calls):
        with pytest.raises(UserError, match=r"org/pairs has the splits a, b; write one as `org/pairs:a`\."):
            load_table("org/pairs")

    def test_a_failure_tells_name_and_reason(self, calls):
        with pytest.raises(UserError, match=r"split 'x' of the data set .* \(no such data set\); correct the name\."):
            load_table("org/none:x")


@pytest.mark.parametrize(
    "source",
    ["nowhere.jsonl", "./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "a/b/c", "", "nowhere.csv:train"],
)
def test_a_missing_file_is_named(source):
    with pytest.raises(UserError, match="There is no file or folder"):
        load_table(source)


class TestWhatIsNoFile:
    def test_a_pipe(self, tmp_path):
        os.mkfifo(tmp_path / "rows.jsonl")
        with pytest.raises(UserError, match=r"rows\.jsonl is not a file that can be read again and again"):
            load_table(str(tmp_path / "rows.jsonl"))

    @pytest.mark.parametrize("target", ["gone.jsonl", "rows.jsonl"])
    def test_a_link_to_nothing_or_itself(self, tmp_path, target):
        (tmp_path / "rows.jsonl").symlink_to(tmp_path / target)
        with pytest.raises(UserError, match=r"There is no file or folder '.*rows\.jsonl'"):
            load_table(str(tmp_path / "rows.jsonl"))
        with pytest.raises(UserError, match=r"rows\.jsonl is not a file that can be read again and again"):
            load_table(f"{tmp_path}/*.jsonl")

    @pytest.mark.parametrize("source", ["x" * 5000, "~nobody-of-that-name/rows.jsonl", "a/" * 3000])
    def test_a_name_that_cannot_be(self, source):
        with pytest.raises(UserError, match=r"cannot be read \(.*\); correct the path"):
            load_table(source)

    @pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable for root")
    def test_a_file_of_someone_else(self, tmp_path):
        write(tmp_path / "rows.jsonl")
        (tmp_path / "rows.jsonl").chmod(0)
        with pytest.raises(UserError, match=r"rows\.jsonl cannot be read \(.*Permission denied"):
            load_table(str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", "[1]\n", r"a\.jsonl has no row that can be read: Row 1 of .*: it is not a JSON object; correct"),
        (
            "a.json",
            '{"a": 1}\n{"a": 2}\n',
            r"a\.json is not JSON \(.*\); name it \.jsonl if it has one object a line",
        ),
        ("a.json", '{"a": 1}', r"a\.json is not a JSON list of objects"),
        ("a.json", "[1]", r"a\.json has no row that can be read: Row 1 of .*: it is not a JSON object; correct"),
        ("a.parquet", "text", r"a\.parquet cannot be read \(.*\); check the file\."),
        (
            "a.txt",
            "text",
            r"a\.txt has the unknown extension '\.txt'; give a file with one of \.jsonl, \.json",
        ),
        ("a.jsonl", "", r"a\.jsonl has no rows"),
        ("a.csv", "prompt,chosen\n", r"a\.csv has no rows"),
        ("a.json", b'[{"a": "\xff"}]', r"a\.json is not UTF-8 text"),
    ],
)
def test_what_cannot_be_read_is_told(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        load_table(str(path))


def test_a_file_has_no_splits(tmp_path):
    with pytest.raises(UserError, match="is a file and has no splits; leave out `:train`"):
        load_table(write(tmp_path / "rows.jsonl") + ":train")
