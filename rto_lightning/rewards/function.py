"""Scores by a Python function."""

import importlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rto_lightning.backbone import ChatTokenizer, Message
from rto_lightning.errors import UserError
from rto_lightning.rollout import Trajectory, response_texts

RewardFunction = Callable[[list[list[Message]], list[str]], Sequence[float]]


class FunctionReward:
    """A function of prompts and response texts, named as `module:function`.

    Args:
        path: where to import it; it is called as `function(prompts, responses)` with B message lists and B strings and
            returns B numbers; the stage decides about one that is not finite.
        chat: turns response tokens into text.

    Raises:
        UserError: if there is no such function.
    """

    takes_all = False

    def __init__(self, path: str, chat: ChatTokenizer) -> None:
        self.name = path
        self.chat = chat
        self.function = import_function(path, "reward_function")

    def score(self, prompts: list[list[Message]], trajectory: Trajectory) -> Tensor:
        """See :meth:`RewardSource.score`."""
        responses = response_texts(trajectory, self.chat)
        scores = [float(score) for score in self.function(prompts, responses)]
        if len(scores) != len(prompts):
            raise UserError(
                f"{self.name} returned {len(scores)} scores for {len(prompts)} responses; it must return one for each."
            )
        return torch.tensor(scores, dtype=torch.float32, device=trajectory.truncated.device)


def import_function(path: str, setting: str) -> RewardFunction:
    """Import `module:function`.

    Raises:
        UserError: if the path is malformed or names nothing that can be called.
    """
    module_name, _, function_name = path.partition(":")
    if not module_name or not function_name:
        raise UserError(f"{setting} is {path!r}; write it as module:function, for example my_rewards:politeness.")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{setting} {path} could not be imported ({error}); the module must be on PYTHONPATH."
        ) from error
    if not callable(function):
        raise UserError(f"{setting} {path} is not a function.")
    return function
