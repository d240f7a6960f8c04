"""How AlpacaEval and Arena-Hard store an answer.

AlpacaEval (github.com/tatsu-lab/alpaca_eval) takes a JSON list of objects, `model_outputs.json`; Arena-Hard
(github.com/lmarena/arena-hard-auto) takes JSON lines, `model_answer/MODEL.jsonl`, of one kind for its questions v0.1
and of another for v2.0. Its style control reads counts of Markdown, and of tokens; the latter are of the model's own
tokenizer here and of tiktoken's there (its `utils/add_markdown_info.py` counts again).
"""

import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rto_lightning.errors import UserError
from rto_lightning.evaluation.questions import Format, Question

_LONGEST_NAME = 200
"""Bytes; file systems take 255, of which some are for what is written before the file is there."""
_CODE = re.compile(r"```([^`]*)```")
_HEADERS = {f"h{level}": re.compile(rf"^#{{{level}}}\s", re.MULTILINE) for level in range(1, 7)}
_LISTS = {
    "ordered": re.compile(r"^\s*\d+\.\s", re.MULTILINE),
    "unordered": re.compile(r"^\s*[-*+]\s", re.MULTILINE),
}
_BOLD = {"**": re.compile(r"\*\*[^*\n]+\*\*"), "__": re.compile(r"__[^_\n]+__")}


@dataclass(frozen=True)
class GeneratedAnswer:
    """What a model has answered to one question."""

    text: str
    tokens: int
    """Its length, without the stop token."""
    truncated: bool
    """Whether it was cut off at the length limit."""


def answer_file(folder: Path, kind: Format, name: str) -> Path:
    """Where the benchmark looks for the answers of a model, within a folder.

    Raises:
        UserError: if no file can be named like the model.
    """
    as_file = f"{name}.jsonl"
    if not name.strip() or name.startswith(".") or not name.isprintable() or set(name) & set('/\\:*?"<>|'):
        raise UserError(f"--name {name!r} cannot be the name of a file; leave out slashes and the like.")
    if len(as_file.encode()) > _LONGEST_NAME:
        raise UserError(f"--name {name[:40]}... is too long for the name of a file; give a shorter one.")
    return folder / "model_outputs.json" if kind == "alpaca_eval" else folder / "model_answer" / as_file


def answer_file_text(
    kind: Format, name: str, questions: Sequence[Question], answers: Sequence[GeneratedAnswer], started: float
) -> str:
    """The contents of an answer file.

    Args:
        kind: of the benchmark.
        name: of the model.
        questions: N of them.
        answers: one to each.
        started: when their generation began, in seconds since 1970; all rows have it as their time.
    """
    pairs = zip(questions, answers, strict=True)
    if kind == "alpaca_eval":
        rows = [
            {"instruction": question.text, "output": answer.text, "generator": name, **question.columns}
            for question, answer in pairs
        ]
        return json.dumps(rows, ensure_ascii=False, indent=2) + "\n"
    make = _arena_hard_old if kind == "arena_hard_v0.1" else _arena_hard_new
    lines = (json.dumps(make(name, question, answer, started), ensure_ascii=False) for question, answer in pairs)
    return "".join(line + "\n" for line in lines)


def _arena_hard_old(name: str, question: Question, answer: GeneratedAnswer, started: float) -> dict[str, Any]:
    turn = {"content": answer.text, "token_len": answer.tokens}
    return {
        "question_id": question.id,
        "answer_id": _answer_id(name, question, answer),
        "model_id": name,
        "choices": [{"index": 0, "turns": [turn]}],
        "tstamp": started,
        "conv_metadata": style_counts(answer),
    }


def _arena_hard_new(name: str, question: Question, answer: GeneratedAnswer, started: float) -> dict[str, Any]:
    return {
        "uid": question.id,
        "ans_id": _answer_id(name, question, answer),
        "model": name,
        "messages": [*question.messages, {"role": "assistant", "content": {"answer": answer.text}}],
        "tstamp": started,
        "metadata": style_counts(answer),
    }


def style_counts(answer: GeneratedAnswer) -> dict[str, Any]:
    """Tokens of an answer, and its headers, list items and bold phrases outside of code."""
    text = answer.text
    for code in _CODE.findall(text):
        text = text.replace(code, "")  # wherever it stands, as Arena-Hard counts
    kinds = {"header_count": _HEADERS, "list_count": _LISTS, "bold_count": _BOLD}
    counts = {
        kind: {name: len(pattern.findall(text)) for name, pattern in patterns.items()}
        for kind, patterns in kinds.items()
    }
    return {"token_len": answer.tokens, **counts}


def _answer_id(name: str, question: Question, answer: GeneratedAnswer) -> str:
    """22 characters that follow from the answer, so that a file written again is the same."""
    return uuid.uuid5(uuid.NAMESPACE_OID, json.dumps([name, question.id, answer.text])).hex[:22]
