"""Tables of bad rows and bad files, with what is to be said of each."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from rto_lightning.data import DemonstrationDataModule, PreferenceDataModule, PromptDataModule

MODULES = {"preferences": PreferenceDataModule, "prompts": PromptDataModule, "demonstrations": DemonstrationDataModule}

SURROGATE = "has the lone surrogate '\\ud800', which is no character"
NO_QUESTION = "does not end with a message of the user"
NEITHER = "is neither text nor a list of messages"
TEXT_NEEDED = "has no `role` and `content` of text"


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


HI, YES = user("Hi"), assistant("Yes")

GOOD_TEXTS = {
    "preferences": {"prompt": "Hi", "chosen": "Yes", "rejected": "No"},
    "prompts": {"prompt": "Hi"},
    "demonstrations": {"prompt": "Hi", "response": "Yes"},
}
GOOD_MESSAGES = {
    "preferences": {"prompt": [HI], "chosen": [YES], "rejected": [YES]},
    "prompts": {"messages": [HI]},
    "demonstrations": {"messages": [HI, YES]},
}

LINES = {
    "cut in the middle": (b'{"prompt": "Hi", "cho', "it is not JSON (Unterminated string"),
    "cut behind a comma": (b'{"prompt": "Hi",', "it is not JSON (Expecting property name"),
    "no JSON": (b"prompt: Hi", "it is not JSON (Expecting value, character 1)"),
    "Python": (b"{'prompt': 'Hi'}", "it is not JSON (Expecting property name"),
    "two on a line": (b'{"prompt": "Hi"}{"prompt": "Hi"}', "it is not JSON (Extra data, character 17)"),
    "a comma behind it": (b'{"prompt": "Hi"},', "it is not JSON (Extra data, character 17)"),
    "raw tabulator": (b'{"prompt": "\t"}', "it is not JSON (Invalid control character"),
    "raw NUL": (b'{"prompt": "\0"}', "it is not JSON (Invalid control character"),
    "NULs": (bytes(40), "it is not JSON (Expecting value, character 1)"),
    "wrong escape": (b'{"prompt": "\\x"}', "it is not JSON (Invalid \\escape"),
    "half an escape": (b'{"prompt": "\\ud8"}', "it is not JSON (Invalid \\uXXXX escape"),
    "a list": (b'["Hi", "Yes"]', "it is not a JSON object"),
    "text": (b'"Hi"', "it is not a JSON object"),
    "a number": (b"1", "it is not a JSON object"),
    "NaN": (b"NaN", "it is not a JSON object"),
    "null": (b"null", "it is not a JSON object"),
    "latin-1": ('{"prompt": "é"}'.encode("latin-1"), "it is not UTF-8 text (character 13)"),
    "a cut UTF-8 character": (b'{"prompt": "\xf0\x9f"}', "it is not UTF-8 text (character 13)"),
    "an encoded surrogate": (b'{"prompt": "\xed\xa0\x80"}', "it is not UTF-8 text (character 13)"),
    "an overlong NUL": (b'{"prompt": "\xc0\x80"}', "it is not UTF-8 text (character 13)"),
    "UTF-16": ('{"prompt": "Hi"}'.encode("utf-16-le"), "it is not JSON (Expecting property name"),
    "shift of bytes": (b"\x00" + '{"prompt"'.encode("utf-16-le"), "it is not JSON (Expecting value"),
    "endless number": (b'{"n": ' + b"9" * 4400 + b"}", "it cannot be read (Exceeds the limit"),
    "deep lists": (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "it has more than 100 lists and objects"),
    "deep objects": (b'{"a":' * 300 + b"1" + b"}" * 300, "it has more than 100 lists and objects"),
    "deeper than Python": (b'{"a": ' + b"[" * 5000, "it has more than 100 lists and objects"),
    "a long line": (b'{"prompt": "' + b"x" * 9000 + b'"}', "it is longer than 8000 characters"),
    "an unknown table": (b'{"a": 1}', ""),
    "an empty object": (b"{}", ""),
}
"""Lines of a .jsonl file that stand for a row of any kind; an empty reason is that of a row without its columns."""

# For each kind of rows: what is changed in a good row, and why it is then bad. Rows of texts can stand in files of all
# kinds, rows of message lists not in a .csv, and odd ones only in .jsonl and .json, where a column may change its type.
# Huge ones stand in .json and .parquet; in the others it is their line that is too long.

_TRANSCRIPT = "\n\nHuman: Hi\n\nAssistant: Yes"
TEXTS: dict[str, dict[str, tuple[dict[str, Any], str]]] = {
    "preferences": {
        "empty prompt": ({"prompt": ""}, "the prompt in `prompt` is empty"),
        "blank prompt": ({"prompt": " \n\t\r"}, "the prompt in `prompt` is empty"),
        "wide blanks": ({"prompt": "\u00a0\u2003\u3000"}, "the prompt in `prompt` is empty"),
        "empty chosen": ({"chosen": ""}, "the answer in `chosen` is empty"),
        "blank chosen": ({"chosen": "\n"}, "the answer in `chosen` is empty"),
        "empty rejected": ({"rejected": ""}, "the answer in `rejected` is empty"),
        "blank rejected": ({"rejected": "\u2029"}, "the answer in `rejected` is empty"),
        "answered transcript": ({"prompt": _TRANSCRIPT}, NO_QUESTION),
        "transcript of nothing": ({"prompt": "\n\nHuman:\n\nAssistant:"}, "the prompt in `prompt` is empty"),
    },
    "prompts": {
        "empty": ({"prompt": ""}, "the prompt in `prompt` is empty"),
        "blank": ({"prompt": "  "}, "the prompt in `prompt` is empty"),
        "vertical blanks": ({"prompt": "\x0b\x0c\x85"}, "the prompt in `prompt` is empty"),
        "answered transcript": ({"prompt": _TRANSCRIPT}, NO_QUESTION),
        "transcript of nothing": ({"prompt": "\n\nHuman: "}, "the prompt in `prompt` is empty"),
    },
    "demonstrations": {
        "empty prompt": ({"prompt": ""}, "the prompt in `prompt` is empty"),
        "empty response": ({"response": ""}, "the answer in `response` is empty"),
        "blank response": ({"response": " \n"}, "the answer in `response` is empty"),
        "response of separators": ({"response": "\x1c\x1d\x1e\x1f"}, "the answer in `response` is empty"),
        "answered transcript": ({"prompt": _TRANSCRIPT}, NO_QUESTION),
    },
}
MESSAGES: dict[str, dict[str, tuple[dict[str, Any], str]]] = {
    "preferences": {
        "no prompt": ({"prompt": None}, "`prompt` is neither text nor"),
        "no chosen": ({"chosen": None}, f"`chosen` {NEITHER}"),
        "no rejected": ({"rejected": None}, f"`rejected` {NEITHER}"),
        "no messages": ({"chosen": []}, "`chosen` is not a list of messages"),
        "no content": ({"chosen": [assistant(None)]}, TEXT_NEEDED),
        "no role": ({"rejected": [{"role": None, "content": "No"}]}, TEXT_NEEDED),
        "unknown role": ({"chosen": [{"role": "bot", "content": "Yes"}]}, "has the role 'bot', which is none of"),
        "answer by the user": ({"chosen": [HI]}, "the last message of `chosen` is not the assistant's"),
        "prompt by the assistant": ({"prompt": [HI, YES]}, NO_QUESTION),
        "two prompts": ({"rejected": [user("Ho"), YES], "prompt": []}, "`prompt` is not a list of messages"),
        "empty answer": ({"chosen": [assistant("")]}, "the answer in `chosen` is empty"),
    },
    "prompts": {
        "no messages": ({"messages": None}, "`messages` is not a list of messages"),
        "empty list": ({"messages": []}, "`messages` is not a list of messages"),
        "no content": ({"messages": [user(None)]}, TEXT_NEEDED),
        "unknown role": ({"messages": [{"role": "human", "content": "Hi"}]}, "has the role 'human', which is none of"),
        "role in capitals": ({"messages": [{"role": "User", "content": "Hi"}]}, "has the role 'User', which is none"),
        "nobody asks": ({"messages": [{"role": "system", "content": "Hi"}]}, NO_QUESTION),
        "only an answer": ({"messages": [YES]}, NO_QUESTION),
        "two answers": ({"messages": [HI, YES, YES]}, NO_QUESTION),
        "empty question": ({"messages": [user(" ")]}, "the prompt in `messages` is empty"),
    },
    "demonstrations": {
        "no messages": ({"messages": None}, f"`messages` {NEITHER}"),
        "empty list": ({"messages": []}, "`messages` is not a list of messages"),
        "nobody answers": ({"messages": [HI]}, "the last message of `messages` is not the assistant's"),
        "nobody asks": ({"messages": [YES]}, f"`prompt` {NEITHER}"),
        "no content": ({"messages": [HI, assistant(None)]}, TEXT_NEEDED),
        "unknown role": ({"messages": [HI, {"role": "gpt", "content": "Yes"}]}, "has the role 'gpt', which is none"),
        "empty answer": ({"messages": [HI, assistant("\n")]}, "the answer in `messages` is empty"),
        "empty question": ({"messages": [user(""), YES]}, "the prompt in `messages` is empty"),
    },
}
ODD: dict[str, dict[str, tuple[dict[str, Any], str]]] = {
    "preferences": {
        "integer prompt": ({"prompt": 3}, f"`prompt` {NEITHER}"),
        "NaN for a prompt": ({"prompt": float("nan")}, f"`prompt` {NEITHER}"),
        "true for a prompt": ({"prompt": True}, f"`prompt` {NEITHER}"),
        "object for a prompt": ({"prompt": HI}, f"`prompt` {NEITHER}"),
        "number for an answer": ({"chosen": 1.5}, f"`chosen` {NEITHER}"),
        "object for an answer": ({"rejected": YES}, f"`rejected` {NEITHER}"),
        "answers of texts": ({"chosen": ["Yes"]}, "a message of `chosen` is not an object with"),
        "lists in lists": ({"chosen": [[YES]]}, "a message of `chosen` is not an object with"),
        "content in parts": ({"chosen": [assistant([{"type": "text", "text": "Yes"}])]}, TEXT_NEEDED),
        "integer content": ({"rejected": [assistant(7)]}, TEXT_NEEDED),
        "surrogate in the prompt": ({"prompt": "a\ud800"}, SURROGATE),
        "surrogate in an answer": ({"rejected": "\ud800a"}, SURROGATE),
        "answers to two prompts": ({"rejected": [user("Ho"), YES]}, "answer different prompts"),
        "changed type": ({"chosen": [HI]}, "the last message of `chosen` is not the assistant's"),
    },
    "prompts": {
        "integer": ({"prompt": 3}, f"`prompt` {NEITHER}"),
        "false": ({"prompt": False}, f"`prompt` {NEITHER}"),
        "infinite": ({"prompt": float("inf")}, f"`prompt` {NEITHER}"),
        "object": ({"prompt": HI}, f"`prompt` {NEITHER}"),
        "list of texts": ({"prompt": ["Hi"]}, "a message of `prompt` is not an object with"),
        "content in parts": ({"prompt": [user([{"type": "text", "text": "Hi"}])]}, TEXT_NEEDED),
        "role of a number": ({"prompt": [{"role": 1, "content": "Hi"}]}, TEXT_NEEDED),
        "surrogate": ({"prompt": "\ud800"}, SURROGATE),
        "surrogate in a message": ({"prompt": [{"role": "system", "content": "\ud800"}, HI]}, SURROGATE),
        "empty list": ({"prompt": []}, "`prompt` is not a list of messages"),
    },
    "demonstrations": {
        "integer prompt": ({"prompt": 3}, f"`prompt` {NEITHER}"),
        "integer response": ({"response": 3}, f"`response` {NEITHER}"),
        "object for a response": ({"response": YES}, f"`response` {NEITHER}"),
        "response of texts": ({"response": ["Yes"]}, "a message of `response` is not an object with"),
        "surrogate in the prompt": ({"prompt": "Hi\ud800"}, SURROGATE),
        "surrogate in the response": ({"response": "Yes\ud800"}, SURROGATE),
        "content in parts": ({"response": [assistant([{"text": "Yes"}])]}, TEXT_NEEDED),
        "question for a response": ({"response": [HI]}, "the last message of `response` is not the assistant's"),
    },
}
_HUGE = "its texts have more than 8000 characters"
HUGE: dict[str, dict[str, tuple[dict[str, Any], str]]] = {
    "preferences": {"huge chosen": ({"chosen": "x" * 7999}, _HUGE), "huge rejected": ({"rejected": "é" * 9000}, _HUGE)},
    "prompts": {"huge prompt": ({"prompt": "x" * 8001}, _HUGE)},
    "demonstrations": {"huge together": ({"prompt": "x" * 4000, "response": " x" * 2001}, _HUGE)},
}


def _parquet() -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pa.table({"prompt": ["Hi"] * 1000}), buffer)
    return buffer.getvalue()


_ROW = b'{"prompt": "Hi"}\n'
_CANNOT_BE_READ = "cannot be read ("
FILES = {
    "a.jsonl empty": (b"", "has no rows"),
    "b.jsonl of blank lines": (b"\n\r\n  \n", "has no rows"),
    "c.jsonl of a mark": (b"\xef\xbb\xbf", "has no rows"),
    "d.jsonl of nonsense": (b"nonsense\n" * 9, "has no row that can be read: Row 1 of"),
    "e.jsonl of empty objects": (b"{}\n{}\n", "has the columns none, but needs"),
    "f.jsonl of other columns": (b'{"question": "Hi"}\n', "has the columns `question`, but needs"),
    "g.jsonl UTF-16": (_ROW.decode().encode("utf-16"), "is UTF-16 or UTF-32 text and not UTF-8 text"),
    "h.jsonl UTF-16 big": (b"\xfe\xff" + _ROW.decode().encode("utf-16-be"), "is UTF-16 text and not"),
    "i.jsonl UTF-16 unmarked": (_ROW.decode().encode("utf-16-le"), "has no row that can be read: Row 1 of"),
    "j.jsonl gzip": (gzip.compress(_ROW), "is compressed by gzip and not UTF-8 text; unpack"),
    "k.jsonl zip": (b"PK\x03\x04" + _ROW, "is a zip archive and not UTF-8 text; unpack"),
    "l.jsonl Zstandard": (b"\x28\xb5\x2f\xfd" + _ROW, "is compressed by Zstandard and not"),
    "m.jsonl xz": (b"\xfd7zXZ\x00" + _ROW, "is compressed by xz and not"),
    "n.jsonl bzip2": (b"BZh9" + _ROW, "is compressed by bzip2 and not"),
    "o.jsonl parquet": (_parquet(), "is a Parquet file and not UTF-8 text"),
    "p.json empty": (b"", "is not JSON"),
    "q.json cut": (b'[{"prompt": "Hi"}, {"pro', "is not JSON"),
    "r.json of lines": (_ROW * 2, "name it .jsonl if it has one object a line"),
    "s.json of one object": (b'{"prompt": "Hi"}', "is not a JSON list of objects"),
    "t.json of nothing": (b"[]", "has no rows"),
    "u.json of numbers": (b"[1, 2]", "has no row that can be read: Row 1 of"),
    "v.json latin-1": ('[{"prompt": "é"}]'.encode("latin-1"), "is not UTF-8 text"),
    "w.json deep": (b"[" * 9999, _CANNOT_BE_READ),
    "x.json gzip": (gzip.compress(b"[]"), "is compressed by gzip and not"),
    "a.csv empty": (b"", "has no rows"),
    "b.csv header": (b"prompt,response\n", "has no rows"),
    "c.csv without header": (b"Hi,Yes\nHi,No\n", "has the columns `Hi`, `Yes`, but needs"),
    "d.csv open quote": (b'prompt\nHi\n"Hi\nHi\n', "from line 3 on, is not CSV (unexpected end of data)"),
    "e.csv quote in text": (b'prompt\n"Say "Hi" now"\n', "from line 2 on, is not CSV (',' expected"),
    "f.csv twice a column": (b"prompt,prompt\nHi,Ho\n", "has two columns of one name"),
    "g.csv huge line": (b"prompt\n" + b"x" * 9000 + b"\n", "is longer than 8000 characters"),
    "h.csv huge cell": (b'prompt\n"' + b"x\n" * 5000 + b'"\n', "is not CSV (field larger than field limit"),
    "i.csv UTF-16": ("prompt\nHi\n".encode("utf-16"), "is UTF-16 or UTF-32 text and not"),
    "a.parquet empty": (b"", _CANNOT_BE_READ),
    "b.parquet of text": (_ROW, _CANNOT_BE_READ),
    "c.parquet cut": (_parquet()[:-9], _CANNOT_BE_READ),
    "d.parquet half": (_parquet()[: len(_parquet()) // 2], _CANNOT_BE_READ),
    "e.parquet without its end": (b"PAR1" + bytes(100), _CANNOT_BE_READ),
    "a.txt": (_ROW, "has the unknown extension '.txt'"),
    "a.jsonl.gz": (gzip.compress(_ROW), "has the unknown extension '.gz'"),
    "noname": (_ROW, "has the unknown extension ''"),
}
"""Files by their name up to the first space, and what is said of them whether bad rows are skipped or not."""


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """A file of one of the kinds that can be read."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
