"""Scores by a Python function."""

import importlib
import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress

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
        scores = call_reward_function(self.name, self.function, prompts, response_texts(trajectory, self.chat))
        return torch.tensor(scores, dtype=torch.float32, device=trajectory.truncated.device)


def call_reward_function(
    name: str, function: RewardFunction, prompts: list[list[Message]], responses: list[str]
) -> list[float]:
    """The scores of B responses.

    Args:
        name: of the function, for errors.
        function: the function.
        prompts: B message lists.
        responses: B texts.

    Raises:
        UserError: if it returns something else than B numbers.
    """
    returned = function(prompts, responses)
    try:
        scores = [float(score) for score in returned]
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} returned what is no list of numbers ({error}); it must be one.") from error
    if len(scores) != len(responses):
        raise UserError(
            f"{name} returned {len(scores)} scores for {len(responses)} responses; it must return one for each."
        )
    return scores


def import_function(path: str, setting: str) -> RewardFunction:
    """Import `module:function`.

    Raises:
        UserError: if the path is malformed or names nothing that can be called with prompts and responses.
    """
    module_name, _, function_name = path.partition(":")
    if not module_name or not function_name:
        raise UserError(f"{setting} is {path!r}; write it as module:function, for example my_rewards:politeness.")
    try:
        found = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{setting} {path} could not be imported ({error}); the module must be on PYTHONPATH."
        ) from error
    if not callable(found):
        raise UserError(f"{setting} {path} is not a function.")
    with suppress(ValueError):  # of a built-in function, which does not tell what it takes
        try:
            inspect.signature(found).bind([], [])
        except TypeError as error:
            raise UserError(
                f"{setting} {path} does not take what it is called with, (prompts, responses): {error}."
            ) from error
    function: RewardFunction = found
    return function
