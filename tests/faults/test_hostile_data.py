"""Bad rows and bad files through the data modules: each is named, or skipped and counted.

Every input of the tables is read four times: held in memory and streamed, with bad rows as errors and skipped.
"""

import json

import pytest

from rto_lightning.backbone.chat import ChatTokenizer
from rto_lightning.data import files
from rto_lightning.errors import UserError
from tests.faults.hostile_rows import (
    FILES,
    GOOD_MESSAGES,
    GOOD_TEXTS,
    HI,
    HUGE,
    LINES,
    MESSAGES,
    MODULES,
    ODD,
    TEXTS,
    write_rows,
)
from tests.tiny import CHATML, tiny_tokenizer

pytestmark = pytest.mark.slow
AREA = "hostile data"
BAD_ROW = 3
KEPT = [0, 1, 3, 4]
"""The rows beside it, from 0."""


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    """Texts of kilobytes are huge, so that the tables stay small."""
    monkeypatch.setattr(files, "MOST_CHARACTERS", 8000)
    monkeypatch.setattr("rto_lightning.data.formats.MOST_CHARACTERS", 8000)


@pytest.fixture(scope="module")
def chat():
    return ChatTokenizer(tiny_tokenizer())


def indices(kind, source, chat, streaming, bad_rows):
    """The rows of a source that a data module of a kind gives."""
    options = {"batch_size": 2, "streaming": streaming, "shuffle_buffer_rows": 1, "bad_rows": bad_rows}
    data = MODULES[kind](train=str(source), **options)
    data.chat = chat
    data.setup("fit")
    if not streaming:
        return [row.index for row in data.rows["train"]]
    return [index for batch in data.train_dataloader() for index in batch.index.tolist()]


def check_answers(kind, path, chat, reason, caplog):
    """A bad third row is named, or skipped and counted."""
    place = f"Row {BAD_ROW} of {path}: "
    for streaming in (False, True):
        with pytest.raises(UserError) as error:
            indices(kind, path, chat, streaming, "error")
        assert str(error.value).startswith(place)
        assert reason in str(error.value)
        assert str(error.value).endswith("; correct it, or set data.bad_rows to `skip`.")
        caplog.clear()
        assert indices(kind, path, chat, streaming, "skip") == KEPT
        assert caplog.messages[-1].startswith(f"{path}: skipped 1 bad rows, the first of them {place}")
        assert reason in caplog.messages[-1]


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("fault", LINES)
def test_a_line_that_is_no_row(faults, tmp_path, chat, caplog, kind, fault):
    line, reason = LINES[fault]
    good = json.dumps(GOOD_TEXTS[kind]).encode()
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([good, good, line, good, good]))
    with faults.tried(AREA, f"{kind}, a line of a .jsonl file: {fault}"):
        check_answers(kind, path, chat, reason, caplog)


@pytest.mark.parametrize("kind", MODULES)
def test_a_last_line_that_is_cut(faults, tmp_path, chat, caplog, kind):
    good = json.dumps(GOOD_TEXTS[kind]).encode()
    for cut in range(1, len(good)):
        path = tmp_path / f"{cut}.jsonl"
        path.write_bytes(b"\r\n".join([good, b"", good, good[:cut]]))
        with faults.tried(AREA, f"{kind}, cut after {cut} bytes"):
            for streaming in (False, True):
                with pytest.raises(UserError, match=rf"^Row 4 of {path}: it is not JSON \(.*\); correct it, or set"):
                    indices(kind, path, chat, streaming, "error")
                caplog.clear()
                assert indices(kind, path, chat, streaming, "skip") == [0, 1]
                assert f"skipped 1 bad rows, the first of them Row 4 of {path}: it is not JSON" in caplog.text


ROWS = [
    (kind, extension, name, {**good[kind], **changes}, good[kind], reason)
    for table, good, extensions in (
        (TEXTS, GOOD_TEXTS, ("jsonl", "json", "csv", "parquet")),
        (MESSAGES, GOOD_MESSAGES, ("jsonl", "json", "parquet")),
        (ODD, GOOD_TEXTS, ("jsonl", "json")),
        (HUGE, GOOD_TEXTS, ("json", "parquet")),
    )
    for kind in table
    for name, (changes, reason) in table[kind].items()
    for extension in extensions
]


@pytest.mark.parametrize(
    ("kind", "extension", "name", "bad", "good", "reason"), ROWS, ids=[f"{row[0]}-{row[1]}-{row[2]}" for row in ROWS]
)
def test_a_row_that_is_bad(faults, tmp_path, chat, caplog, kind, extension, name, bad, good, reason):
    path = tmp_path / f"rows.{extension}"
    write_rows(path, [good, good, bad, good, good])
    with faults.tried(AREA, f"{kind}, .{extension}: {name}"):
        check_answers(kind, path, chat, reason, caplog)


@pytest.mark.parametrize("fault", FILES)
def test_a_file_that_cannot_be_read(faults, tmp_path, chat, fault):
    content, message = FILES[fault]
    path = tmp_path / fault.split()[0]
    path.write_bytes(content)
    with faults.tried(AREA, f"file: {fault}"):
        for streaming in (False, True):
            for bad_rows in ("error", "skip"):
                with pytest.raises(UserError) as error:
                    indices("prompts", path, chat, streaming, bad_rows)
                assert str(path) in str(error.value)
                assert message in str(error.value)
                assert "\n" not in str(error.value)


TEMPLATES = {
    "drops the system turn": (CHATML.replace("messages %}", "messages if message.role != 'system' %}"), "leaves out"),
    "refuses it": ("{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML, "refuses"),
    "fails on it": ("{% if messages[0].role == 'system' %}{{ 1 + 'a' }}{% endif %}" + CHATML, "refuses"),
    "divides by zero": ("{% if messages[0].role == 'system' %}{{ 1 // 0 }}{% endif %}" + CHATML, "refuses"),
}


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("fault", TEMPLATES)
def test_a_template_that_cannot_write_a_row(faults, tmp_path, caplog, kind, fault):
    template, reason = TEMPLATES[fault]
    good = {**GOOD_TEXTS[kind], "prompt": [HI]}
    bad = {**good, "prompt": [{"role": "system", "content": "Be brief."}, HI]}
    path = tmp_path / "rows.jsonl"
    write_rows(path, [good, good, bad, good, good])
    with faults.tried(AREA, f"{kind}, a template that {fault}"):
        check_answers(kind, path, ChatTokenizer(tiny_tokenizer(), chat_template=template), reason, caplog)


def test_nothing_but_prompts_over_the_limit(faults, tmp_path, chat):
    for kind in MODULES:
        path = tmp_path / f"{kind}.jsonl"
        write_rows(path, [{**GOOD_TEXTS[kind], "prompt": "x" * 600}] * 9)
        with faults.tried(AREA, f"{kind}, all prompts are too long"):
            for streaming in (False, True):
                with pytest.raises(UserError, match=r"usable row.*0 are bad and 9 have a prompt of more than"):
                    indices(kind, path, chat, streaming, "skip")
