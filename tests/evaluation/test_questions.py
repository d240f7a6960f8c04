"""Questions of each benchmark, and what is refused."""

import json

import pytest

from rto_lightning.errors import UserError
from rto_lightning.evaluation.questions import BenchmarkError, Question, read_questions

ALPACA_EVAL = {"instruction": "Hi?", "output": "Hello.", "generator": "x", "dataset": "koala", "datasplit": "eval"}
OLD = {"question_id": "a1", "category": "arena-hard-v0.1", "cluster": "Maths", "turns": [{"content": "2+2?"}]}
NEW = {"uid": "u1", "category": "hard_prompt", "subcategory": "coding", "prompt": "Sort it."}


def write(path, *rows):
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("name", "row", "kind", "question"),
    [
        (
            "eval.json",
            ALPACA_EVAL,
            "alpaca_eval",
            Question("Hi?", "Hi?", "koala", {"dataset": "koala", "datasplit": "eval"}),
        ),
        ("question.jsonl", OLD, "arena_hard_v0.1", Question("a1", "2+2?", "arena-hard-v0.1")),
        ("question.jsonl", NEW, "arena_hard_v2.0", Question("u1", "Sort it.", "coding")),
        ("prompts.jsonl", {"prompt": "Own one"}, "alpaca_eval", Question("Own one", "Own one")),
    ],
)
def test_the_columns_tell_the_benchmark(tmp_path, name, row, kind, question):
    read = read_questions(write(tmp_path / name, row))
    assert (read.format, read.rows) == (kind, [question])


def test_a_question_that_occurs_twice_is_named(tmp_path):
    path = write(tmp_path / "question.jsonl", NEW, {**NEW, "uid": "u2"}, NEW)
    with pytest.raises(BenchmarkError, match=r"has 'u1' more than once"):
        read_questions(path)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**NEW, "prompt": " "}, "Row 1 of .*`prompt` is empty"),
        ({**OLD, "turns": [{"content": "a"}, {"content": "b"}]}, "several turns are not supported"),
        ({"messages": [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]}, "several messages"),
        ({"question": "a"}, "has the columns `question`"),
        ({**NEW, "prompt": "a\ud800"}, "Row 1 of .*lone surrogate"),
        ({"prompt": "a\ud800"}, "Row 1 of .*lone surrogate"),
    ],
)
def test_what_is_no_question_is_refused(tmp_path, row, reason):
    with pytest.raises(UserError, match=reason):
        read_questions(write(tmp_path / "question.jsonl", row))


def test_the_row_of_a_bad_prompt_is_named(tmp_path):
    path = write(tmp_path / "prompts.jsonl", {"prompt": "a"}, {"prompt": "b"}, {"prompt": ""})
    with pytest.raises(BenchmarkError, match=r"^Row 3 of .*prompts.jsonl: the prompt in `prompt` is empty; correct"):
        read_questions(path)
