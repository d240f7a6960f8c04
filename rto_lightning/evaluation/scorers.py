"""Sources of rewards as scorers of texts: a reward role, an outside reward model, a service, a Python function.

An answer that is too long for a model has no score, and what is compared with it stays unjudged.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from tqdm import tqdm

from rto_lightning.backbone import ChatTokenizer, Message, Sequences
from rto_lightning.backbone.loading import load_chat_tokenizer_from
from rto_lightning.evaluation.judging import Scorer
from rto_lightning.rewards import OutsideRewardModel, RemoteReward, RewardServiceSettings, RewardSource
from rto_lightning.rewards.function import call_reward_function, import_function
from rto_lightning.rewards.remote import ServedRole
from rto_lightning.rewards.remote.protocol import ScoreRequest
from rto_lightning.rollout import Trajectory

_BATCHES_AT_ONCE = 8
"""Batches whose answers a role sorts by length before it reads them."""


def role_scorer(role: ServedRole) -> Scorer:
    """The scores of a reward role."""

    def score(prompts: list[list[Message]], texts: list[str]) -> list[float]:
        rows = role.encode(ScoreRequest([], messages=prompts, responses=texts))
        scores = [math.nan] * len(texts)
        for part in _parts([len(row) for row in rows], role.context_length, _BATCHES_AT_ONCE * role.batch_size):
            picked = ScoreRequest([], messages=[prompts[n] for n in part], responses=[texts[n] for n in part])
            for number, value in zip(part, role(picked), strict=True):
                scores[number] = value
        return scores

    return score


def outside_scorer(model: OutsideRewardModel, batch_size: int) -> Scorer:
    """The scores of an outside reward model, whose policy's tokenizer is its own."""
    chat = model.chat
    device = next(model.parameters()).device

    def score(prompts: list[list[Message]], texts: list[str]) -> list[float]:
        pairs = zip(chat.encode_prompts(prompts), chat.encode_responses(texts, sys.maxsize), strict=True)
        rows = list(pairs)
        scores = [math.nan] * len(texts)
        for part in _parts([len(prompt) + len(answer) for prompt, answer in rows], model.context_length, batch_size):
            trajectory = _trajectory([rows[number] for number in part], chat, device)
            for number, value in zip(part, model.score([prompts[n] for n in part], trajectory).tolist(), strict=True):
                scores[number] = value
        return scores

    return score


def service_scorer(urls: list[str], tokenizer: str, settings: RewardServiceSettings) -> Scorer:
    """The scores of a reward service.

    Args:
        urls: its address, or several.
        tokenizer: folder or hub name of the model by whose chat template `query` is written.
        settings: how it is asked.
    """
    chat = load_chat_tokenizer_from(tokenizer)
    source: RewardSource = RemoteReward(urls, settings, chat)

    def score(prompts: list[list[Message]], texts: list[str]) -> list[float]:
        rows = zip(chat.encode_prompts(prompts), chat.encode_responses(texts, sys.maxsize), strict=True)
        scores: list[float] = source.score(prompts, _trajectory(list(rows), chat, torch.device("cpu"))).tolist()
        return scores

    return score


def function_scorer(path: str) -> Scorer:
    """The scores of a Python function `module:function`, called as `model.reward_function` is.

    Raises:
        UserError: if there is none, or, when it is called, if it gives something else than a number for each answer.
    """
    function = import_function(path, "--reward_function")
    return partial(call_reward_function, path, function)


def _parts(lengths: Sequence[int], longest: int, size: int) -> Iterator[list[int]]:
    """The numbers of answers that a model takes, part by part, with a progress bar over all."""
    with tqdm(total=len(lengths), desc="scores", unit="answer", mininterval=1.0) as bar:
        fitting = [number for number, length in enumerate(lengths) if length <= longest]
        bar.update(len(lengths) - len(fitting))
        for start in range(0, len(fitting), size):
            part = fitting[start : start + size]
            yield part
            bar.update(len(part))


def _trajectory(rows: Sequence[tuple[list[int], list[int]]], chat: ChatTokenizer, device: torch.device) -> Trajectory:
    """Prompts and answers that have ended, as tokens."""
    sequences = Sequences.from_lists([prompt for prompt, _ in rows], [answer for _, answer in rows], chat.pad_id)
    return Trajectory(sequences.to(device), torch.zeros(len(rows), dtype=torch.bool, device=device))
