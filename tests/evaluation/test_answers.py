"""Answer files of each format, and those that cannot be compared."""

import json
from pathlib import Path

import pytest

from rto_lightning.evaluation.answer_rows import GeneratedAnswer, answer_file_text
from rto_lightning.evaluation.answers import match_answers, read_answers
from rto_lightning.evaluation.questions import BenchmarkError, Question, Questions

TEXTS = {"id0": "First?", "id1": "Second?", "id2": "Third?"}


def questions(kind):
    return Questions(
        kind, [Question(text if kind == "alpaca_eval" else name, text, "c") for name, text in TEXTS.items()]
    )


def write(folder, kind, name):
    path = folder / f"{name}.json{'' if kind == 'alpaca_eval' else 'l'}"
    answers = [GeneratedAnswer(f"{name} says {text}", 3, False) for text in TEXTS.values()]
    path.write_text(answer_file_text(kind, name, questions(kind).rows, answers, 0.0), encoding="utf-8")
    return str(path)


def change(path, edit):
    """Edit the rows of an answer file of Arena-Hard."""
    rows = edit([json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()])
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["alpaca_eval", "arena_hard_v0.1", "arena_hard_v2.0"])
def test_what_is_generated_can_be_compared(tmp_path, kind):
    first, second = (read_answers(write(tmp_path, kind, name)) for name in ("one", "two"))
    matched = match_answers(first, [second], questions(kind) if kind == "arena_hard_v0.1" else None)
    assert list(matched) == ["two"]
    assert [comparison.prompt for comparison in matched["two"]] == [
        [{"role": "user", "content": text}] for text in TEXTS.values()
    ]
    assert matched["two"][1].baseline == "one says Second?" and matched["two"][1].answer == "two says Second?"


def test_answers_of_predict_can_be_compared(tmp_path):
    row = {"index": 0, "prompt": [{"role": "user", "content": "Hi"}], "response": "Hello", "truncated": False}
    paths = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    for path in paths:
        Path(path).write_text(json.dumps(row) + "\n")
    matched = match_answers(read_answers(paths[0]), [read_answers(paths[1])])
    assert matched[paths[1]][0].prompt == row["prompt"]


def test_models_of_one_name_are_told_apart_by_their_files(tmp_path):
    path = write(tmp_path, "alpaca_eval", "one")
    file = read_answers(path)
    assert list(match_answers(file, [file])) == [path]


EDITS = {
    "missing": lambda rows: rows[1:],
    "more": lambda rows: [*rows, {**rows[0], "uid": "id9"}],
    "twice": lambda rows: [*rows, rows[0]],
    "empty": lambda rows: [{**rows[0], "messages": [rows[0]["messages"][0], {"content": {"answer": " "}}]}, *rows[1:]],
    "prompt": lambda rows: [
        {**rows[0], "messages": [{"role": "user", "content": "Another?"}, rows[0]["messages"][1]]},
        *rows[1:],
    ],
    "model": lambda rows: [{**rows[0], "model": "three"}, *rows[1:]],
    "format": lambda rows: [rows[0], {**rows[1], "messages": "no list"}, rows[2]],
    "other questions": lambda rows: [{**row, "uid": f"other {row['uid']}"} for row in rows],
    "surrogate": lambda rows: [
        {**rows[0], "messages": [rows[0]["messages"][0], {"content": {"answer": "a\ud800"}}]},
        *rows[1:],
    ],
}
MESSAGES = {
    "missing": r"two.jsonl does not answer 'id0' of .*one.jsonl",
    "more": r"two.jsonl answers 'id9' which are not of .*one.jsonl",
    "twice": r"two.jsonl answers 'id0' more than once",
    "empty": r"two.jsonl has empty answers to 'id0';",
    "prompt": r"two.jsonl answers other prompts under 'id0';",
    "model": r"several models, three, two",
    "format": r"Row 2 of .*two.jsonl: it is not of the format",
    "other questions": r"two.jsonl answers 'other id0', .* which are not of .*one.jsonl; give files of the same",
    "surrogate": r"Row 1 of .*two.jsonl: `messages` has the lone surrogate",
}


@pytest.mark.parametrize("fault", list(EDITS))
@pytest.mark.parametrize("with_questions", [False, True])
def test_the_ids_at_fault_are_named(tmp_path, fault, with_questions):
    kind = "arena_hard_v2.0"
    first = read_answers(write(tmp_path, kind, "one"))
    path = change(write(tmp_path, kind, "two"), EDITS[fault])
    message = MESSAGES[fault].replace(".*one.jsonl", "the questions") if with_questions else MESSAGES[fault]
    with pytest.raises(BenchmarkError, match=message):
        match_answers(first, [read_answers(path)], questions(kind) if with_questions else None)


def test_of_many_ids_some_are_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"instruction": f"{row}", "output": "", "generator": "a"} for row in range(9)]))
    with pytest.raises(BenchmarkError, match=r"'0', '1', '2', '3', '4' and 4 more"):
        read_answers(str(path))


def test_questions_are_asked_for_where_no_file_has_them(tmp_path):
    file = read_answers(write(tmp_path, "arena_hard_v0.1", "one"))
    with pytest.raises(BenchmarkError, match="add the questions by --questions"):
        match_answers(file, [file])


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "Hi"}\n')
    with pytest.raises(BenchmarkError, match="is no answer file"):
        read_answers(str(path))
