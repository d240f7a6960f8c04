"""The JSON between a run and a reward service: that of OpenRLHF's remote reward models, with more beside it.

A request is a POST of lists that have one entry a response:

    {"query": ["<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello!<|im_end|>"],
     "prompts": ["<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n"],
     "labels": [""],
     "messages": [[{"role": "user", "content": "Hi"}]],
     "responses": ["Hello!"],
     "truncated": [false],
     "vocabulary": "5e0c...", "prompt_ids": [[1, 88, ...]], "response_ids": [[43, ..., 2]]}

and its answer has a number for each:

    {"rewards": [0.37]}

OpenRLHF sends and reads the first three. A service in its manner takes `query`, prompt and response as one text with
all special tokens. `responses` are plain text, `truncated` ones hit the length limit and have no stop token. Text does
not say how it was sampled; the ids do, to a service with the same vocabulary (`ChatTokenizer.fingerprint`).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rto_lightning.backbone import ChatTokenizer, Message
from rto_lightning.rollout import Trajectory, response_texts


class WrongAnswer(Exception):
    """What a reward service sent is no score for each response; the message continues the name of the service."""


class BadRequest(Exception):
    """What a reward service was sent cannot be scored; the message says why."""


@dataclass(frozen=True)
class ScoreRequest:
    """B responses to score, with what a client has said of them; texts alone or more."""

    query: list[str]
    """Prompt and response as one text, with all special tokens."""
    messages: list[list[Message]] | None = None
    """The messages of each prompt."""
    responses: list[str] | None = None
    """The text of each response, without special tokens."""
    truncated: list[bool] | None = None
    """Whether a response has no stop token."""
    vocabulary: str | None = None
    """Fingerprint of the vocabulary of the ids."""
    prompt_ids: list[list[int]] | None = None
    """The tokens of each prompt."""
    response_ids: list[list[int]] | None = None
    """The tokens of each response, its stop token included."""


def request_content(prompts: list[list[Message]], trajectory: Trajectory, chat: ChatTokenizer) -> dict[str, Any]:
    """The request that asks for scores.

    Args:
        prompts: the messages of each prompt, B lists.
        trajectory: the same prompts and their responses.
        chat: turns tokens into text.
    """
    sequences = trajectory.sequences
    attended = sequences.attention_mask[:, : sequences.prompt_width].bool()
    prompt_ids = _rows(sequences.input_ids[:, : sequences.prompt_width], attended)
    response_ids = _rows(sequences.response_ids, sequences.response_mask)
    return {
        "query": _texts(chat, [prompt + response for prompt, response in zip(prompt_ids, response_ids, strict=True)]),
        "prompts": _texts(chat, prompt_ids),
        "labels": [""] * len(prompts),  # what OpenRLHF sends of data without labels
        "messages": prompts,
        "responses": response_texts(trajectory, chat),
        "truncated": trajectory.truncated.tolist(),
        "vocabulary": chat.fingerprint,
        "prompt_ids": prompt_ids,
        "response_ids": response_ids,
    }


def read_answer(body: bytes, count: int) -> list[float]:
    """The scores of an answer: under `rewards`, else `scores`; as numbers, or as lists of one number.

    Args:
        body: of the answer.
        count: responses that were asked about.

    Raises:
        WrongAnswer: if it is no JSON, or there is not one finite number for each response.
    """
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise WrongAnswer(f"sent no JSON ({_shown(body)})") from error
    scores = answer.get("rewards", answer.get("scores")) if isinstance(answer, dict) else None
    if not isinstance(scores, list):
        raise WrongAnswer(f"sent no list `rewards` ({_shown(body)})")
    if len(scores) != count:
        raise WrongAnswer(f"sent {len(scores)} scores for {count} responses")
    return [_score(score, number) for number, score in enumerate(scores)]


def read_request(body: bytes, max_rows: int) -> ScoreRequest:
    """The request of a client: `query`, or `messages` and `responses`, or both; ids as well, or not.

    Args:
        body: of the request.
        max_rows: responses that it may have.

    Raises:
        BadRequest: if it is no JSON, has none of these, or lists that do not fit each other.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest("the body is no JSON") from error
    if not isinstance(content, dict):
        raise BadRequest('the body is no JSON object such as {"query": ["..."]}')
    checks = {
        "query": _is_text,
        "messages": _is_conversation,
        "responses": _is_text,
        "truncated": lambda entry: isinstance(entry, bool),
        "prompt_ids": _are_ids,
        "response_ids": _are_ids,
    }
    lists = {key: content[key] for key in checks if content.get(key) is not None}
    if "query" not in lists and not {"messages", "responses"} <= lists.keys():
        raise BadRequest("there is no `query`")
    for key, entries in lists.items():
        if not isinstance(entries, list) or not all(checks[key](entry) for entry in entries):
            raise BadRequest(f"`{key}` holds something else than it should")
    if len({len(entries) for entries in lists.values()}) > 1:
        raise BadRequest("the lists differ in length")
    rows = len(next(iter(lists.values())))
    if rows > max_rows:
        raise BadRequest(f"there are {rows} responses, and at most {max_rows} are taken at a time")
    vocabulary = content.get("vocabulary")
    return ScoreRequest(**{"query": [], **lists}, vocabulary=vocabulary if isinstance(vocabulary, str) else None)


def _rows(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    return [row[kept].tolist() for row, kept in zip(ids.cpu(), mask.cpu(), strict=True)]


def _texts(chat: ChatTokenizer, rows: list[list[int]]) -> list[str]:
    """With special tokens, as OpenRLHF sends them."""
    texts: list[str] = chat.tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)
    return texts


def _score(score: Any, number: int) -> float:
    if isinstance(score, list) and len(score) == 1:
        score = score[0]
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise WrongAnswer(f"sent {str(score)[:60]!r}, which is no number, for response {number}")
    # Scores are held in float32, in which a larger number is infinite.
    if not abs(score) <= torch.finfo(torch.float32).max:
        raise WrongAnswer(f"sent {str(score)[:60]}, which is not finite, for response {number}")
    return float(score)


def _shown(body: bytes) -> str:
    text = " ".join(body[:400].decode("utf-8", errors="replace").split())
    return repr(text[:100]) if text else "nothing at all"


def _is_text(entry: Any) -> bool:
    try:
        return isinstance(entry, str) and entry.encode() is not None
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return False


def _is_conversation(entry: Any) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) > 0
        and all(
            isinstance(turn, dict) and _is_text(turn.get("role")) and _is_text(turn.get("content")) for turn in entry
        )
    )


def _are_ids(entry: Any) -> bool:
    return isinstance(entry, Sequence) and all(type(token) is int and token >= 0 for token in entry)
