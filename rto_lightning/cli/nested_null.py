"""`null` on the command line for a setting of a group, such as `--model.backbone.chat_template null`.

jsonargparse 4.53 hands it on within a class as the text "None". An object that holds it arrives as it is.
"""

import json
from collections.abc import Sequence
from typing import Any


def null_as_object(args: Sequence[str]) -> list[str]:
    """The arguments, with each `null` for a setting of a group as an object for the group.

    >>> null_as_object(["fit", "--model.rollout.vllm.urls", "null", "--model.reward=null"])
    ['fit', '--model.rollout={"vllm": {"urls": null}}', '--model.reward=null']
    """
    words: list[str] = []
    for word in args:
        if word == "null" and words and _is_of_group(words[-1]):
            words[-1] = _object(words[-1])
        elif word.endswith("=null") and _is_of_group(word.removesuffix("=null")):
            words.append(_object(word.removesuffix("=null")))
        else:
            words.append(word)
    return words


def _is_of_group(word: str) -> bool:
    return word.startswith(("--model.", "--data.")) and word.count(".") > 1 and "=" not in word


def _object(option: str) -> str:
    top, group, *names = option.split(".")
    value: Any = None
    for name in reversed(names):
        value = {name: value}
    return f"{top}.{group}={json.dumps(value)}"
