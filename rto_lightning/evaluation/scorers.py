"""Sources of rewards as scorers of texts: a reward role, an outside reward model, a service, a Python function."""

import math
import sys
from pathlib import Path

import torch

from rto_lightning.backbone import ChatTokenizer, Message, Sequences
from rto_lightning.backbone.loading import load_chat_tokenizer_from
from rto_lightning.backbone.settings import DTYPES
from rto_lightning.errors import UserError
from rto_lightning.evaluation.judging import Scorer
from rto_lightning.evaluation.opening import Dtype, LoadModule, is_whole_model, move
from rto_lightning.export.opening import open_role
from rto_lightning.export.source import find_source
from rto_lightning.rewards import OutsideRewardModel, RemoteReward, RewardServiceSettings, RewardSource
from rto_lightning.rewards.function import import_function
from rto_lightning.rewards.remote import ServedRole
from rto_lightning.rewards.remote.protocol import ScoreRequest
from rto_lightning.rollout import Trajectory


def reward_scorer(
    reward: str,
    load_module: LoadModule,
    dtype: Dtype = "float32",
    base_model: str | None = None,
    device: str | None = None,
    batch_size: int = 16,
) -> Scorer:
    """The scores of a reward role (folder of a stage or role, or checkpoint) or of an outside reward model.

    Raises:
        UserError: if it cannot be loaded, or has no scalar head.
    """
    if is_whole_model(reward):
        chat = load_chat_tokenizer_from(reward)
        source = OutsideRewardModel(reward, chat, DTYPES["float32"])
        return source_scorer(source, chat, move(source, device), batch_size)
    opened = open_role(find_source(Path(reward), "reward"), dtype == "float32", base_model, load_module)
    if opened.head is None:
        raise UserError(f"{reward} has no scalar head; name a saved reward role.")
    move(opened.backbone, device)
    return role_scorer(ServedRole(opened.backbone, opened.name, batch_size))


def role_scorer(role: ServedRole) -> Scorer:
    """The scores of a reward role; an answer that is too long for it has none."""

    def score(prompts: list[list[Message]], texts: list[str]) -> list[float]:
        request = ScoreRequest([], messages=prompts, responses=texts)
        fitting = [number for number, row in enumerate(role.encode(request)) if len(row) <= role.max_tokens]
        picked = ScoreRequest([], messages=[prompts[n] for n in fitting], responses=[texts[n] for n in fitting])
        scores = [math.nan] * len(texts)
        for number, value in zip(fitting, role(picked) if fitting else [], strict=True):
            scores[number] = value
        return scores

    return score


def source_scorer(source: RewardSource, chat: ChatTokenizer, device: torch.device, batch_size: int) -> Scorer:
    """The scores of a source that takes tokens: answers are encoded with a stop, and whole."""

    def score(prompts: list[list[Message]], texts: list[str]) -> list[float]:
        prompt_ids = chat.encode_prompts(prompts)
        answer_ids = chat.encode_responses(texts, sys.maxsize)
        size = len(texts) if source.takes_all else batch_size
        scores: list[float] = []
        for start in range(0, len(texts), size):
            part = slice(start, start + size)
            sequences = Sequences.from_lists(prompt_ids[part], answer_ids[part], chat.pad_id).to(device)
            ended = torch.zeros(len(sequences.input_ids), dtype=torch.bool, device=device)
            scores += source.score(prompts[part], Trajectory(sequences, ended)).tolist()
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
    return source_scorer(RemoteReward(urls, settings, chat), chat, torch.device("cpu"), settings.batch_size)


def function_scorer(path: str) -> Scorer:
    """The scores of a Python function `module:function`, called as `model.reward_function` is.

    Raises:
        UserError: if there is none, or, when it is called, if it gives another number of scores.
    """
    function = import_function(path, "--reward_function")

    def score(prompts: list[list[Message]], texts: list[str]) -> list[float]:
        scores = [float(value) for value in function(prompts, texts)]
        if len(scores) != len(texts):
            raise UserError(f"{path} returned {len(scores)} scores for {len(texts)} answers; it must return one each.")
        return scores

    return score
