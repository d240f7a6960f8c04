"""Answer files of several models, read and matched.

| file | ids | model |
|---|---|---|
| AlpacaEval, `instruction` and `output` | the instruction | `generator` |
| Arena-Hard v0.1, `question_id` and `choices` | `question_id` | `model_id` |
| Arena-Hard v2.0, `uid` and `messages` | `uid` | `model` |
| `predict` of this project, `index` and `response` | `index` | the file |
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rto_lightning.backbone import Message
from rto_lightning.data.files import Row
from rto_lightning.data.sources import Table, load_table
from rto_lightning.evaluation.questions import BenchmarkError, Questions, read_all, refuse_ids, repeated, text_of

_GENERATE_AGAIN = "let the model answer again"


@dataclass(frozen=True)
class Answer:
    """One answer."""

    id: str
    """Of its question."""
    text: str
    prompt: list[Message] | None
    """The conversation that it continues; None where the file does not tell."""
    category: str
    """Part of the benchmark; empty where the file does not tell."""
    model: str
    """Who answered; empty where the file does not tell."""


@dataclass(frozen=True)
class AnswerFile:
    """The answers of one model, by their ids."""

    path: str
    model: str
    answers: dict[str, Answer]


@dataclass(frozen=True)
class Comparison:
    """The answer of a model beside that of a baseline."""

    id: str
    prompt: list[Message]
    category: str
    baseline: str
    """The baseline's answer."""
    answer: str
    """The model's answer."""


def read_answers(path: str) -> AnswerFile:
    """Read an answer file of one of the known formats.

    Raises:
        BenchmarkError: if a row is none, an id occurs twice, an answer is empty, or there are several models.
        UserError: if the file cannot be read.
    """
    table = load_table(path)
    read = _reader(table)
    answers = list(read_all(table, read))
    refuse_ids(repeated(answer.id for answer in answers), f"{path} answers", "more than once", "leave one of each")
    empty = (answer.id for answer in answers if not answer.text.strip())
    refuse_ids(empty, f"{path} has empty answers to", "", _GENERATE_AGAIN)
    models = sorted({answer.model for answer in answers})
    if len(models) > 1:
        raise BenchmarkError(f"{path} holds answers of several models, {', '.join(models[:5])}; split it.")
    return AnswerFile(path, models[0] or path, {answer.id: answer for answer in answers})


def match_answers(
    baseline: AnswerFile, others: Sequence[AnswerFile], questions: Questions | None = None
) -> dict[str, list[Comparison]]:
    """The answers of each model beside those of the baseline, in the order of the questions, else of the baseline.

    Args:
        baseline: what the others are compared with.
        others: the models.
        questions: what was asked; needed where no file tells it.

    Returns:
        Comparisons by the models' names; by their paths where names are the same.

    Raises:
        BenchmarkError: if a file lacks answers, has more than the others, or has answers to other prompts.
    """
    if questions is not None:
        ids = [question.id for question in questions.rows]
        for file in (baseline, *others):
            _check_ids(file, ids, "the questions")
    else:
        ids = list(baseline.answers)
        for file in others:
            _check_ids(file, ids, baseline.path)
    asked = {question.id: question for question in questions.rows} if questions is not None else {}
    prompts = {name: asked[name].messages if name in asked else _prompt_of(name, baseline, *others) for name in ids}
    for file in (baseline, *others):
        differing = (name for name in ids if file.answers[name].prompt not in (None, prompts[name]))
        refuse_ids(differing, f"{file.path} answers other prompts under", "", "give files of the same questions")
    categories = {
        name: (asked[name].category if name in asked else "") or baseline.answers[name].category for name in ids
    }
    names = [file.model for file in (baseline, *others)]
    return {
        file.model if names.count(file.model) == 1 else file.path: [
            Comparison(name, prompts[name], categories[name], baseline.answers[name].text, file.answers[name].text)
            for name in ids
        ]
        for file in others
    }


def _check_ids(file: AnswerFile, ids: Sequence[str], source: str) -> None:
    known = set(ids)
    more = (name for name in file.answers if name not in known)
    refuse_ids(more, f"{file.path} answers", f"which are not of {source}", "give files of the same questions")
    missing = (name for name in ids if name not in file.answers)
    refuse_ids(missing, f"{file.path} does not answer", f"of {source}", _GENERATE_AGAIN)


def _prompt_of(name: str, *files: AnswerFile) -> list[Message]:
    for file in files:
        if (prompt := file.answers[name].prompt) is not None:
            return prompt
    raise BenchmarkError(f"{files[0].path} does not tell what was asked; add the questions by --questions.")


# Rows.


def _reader(table: Table) -> Callable[[Row], Answer]:
    columns = set(table.columns)
    for needed, read in (
        ({"instruction", "output"}, _alpaca_eval),
        ({"question_id", "choices"}, _arena_hard_old),
        ({"uid", "messages"}, _arena_hard_new),
        ({"index", "prompt", "response"}, _prediction),
    ):
        if needed <= columns:
            return read
    raise BenchmarkError(
        f"{table.name} is no answer file of AlpacaEval (`instruction`, `output`), Arena-Hard (`question_id`, `choices` "
        "or `uid`, `messages`) or of predict (`index`, `prompt`, `response`); name one."
    )


def _alpaca_eval(row: Row) -> Answer:
    instruction = text_of(row["instruction"], "instruction")
    prompt = [{"role": "user", "content": instruction}]
    model = text_of(row.get("generator") or "", "generator")
    return Answer(instruction, text_of(row["output"], "output"), prompt, str(row.get("dataset") or ""), model)


def _arena_hard_old(row: Row) -> Answer:
    text = row["choices"][0]["turns"][-1]["content"]
    model = text_of(row.get("model_id") or "", "model_id")
    return Answer(text_of(row["question_id"], "question_id"), text_of(text, "choices"), None, "", model)


def _arena_hard_new(row: Row) -> Answer:
    *prompt, last = row["messages"]
    content: Any = last["content"]
    text = content["answer"] if isinstance(content, dict) else content
    messages = _messages(prompt, "messages")
    model = text_of(row.get("model") or "", "model")
    return Answer(text_of(row["uid"], "uid"), text_of(text, "messages"), messages, "", model)


def _prediction(row: Row) -> Answer:
    messages = _messages(row["prompt"], "prompt")
    return Answer(str(row["index"]), text_of(row["response"], "response"), messages, "", "")


def _messages(value: list[Any], name: str) -> list[Message]:
    return [{key: text_of(message[key], name) for key in ("role", "content")} for message in value]
