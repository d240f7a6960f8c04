"""Optimizers by their short names: `AdamW` is torch's, `AdamW8bit` bitsandbytes'.

jsonargparse takes the short name of any subclass that has been imported, and refuses it where two have the same one.
PEFT imports bitsandbytes, whose optimizers repeat most names of torch's.
"""

import difflib
import importlib
import inspect
import re
from types import ModuleType
from typing import Any

import torch
from jsonargparse import _typehints
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

BITSANDBYTES_OPTIMIZERS = ("AdamW8bit", "PagedAdamW8bit")
"""Those that are proposed where a name is misspelled; its other 8-bit, 32-bit and paged ones are known too."""
OWN_CLASSES = {"model": "rto_lightning.modules", "data": "rto_lightning.data"}
"""For each key that wants a class of ours, where these are."""
_BITSANDBYTES_NAME = re.compile(r"Paged\w+|\w+(8|32)bit")

_resolve = _typehints.resolve_class_path_by_name


def know_optimizers() -> None:
    """From now on the parser takes an optimizer's short name as torch's, else as that of an imported class or of
    bitsandbytes'."""
    _typehints.resolve_class_path_by_name = _resolve_optimizer


def explain_name(key: str, name: str) -> str:
    """Says that no class is known by a short name, and proposes the one that is spelled most alike.

    Args:
        key: The key it stands under, which tells what kind of class is meant.
        name: The name.
    """
    known = _known_names(key)
    by_lower_case = {candidate.lower(): candidate for candidate in known}
    hint = "give its import path (`module.Class`)."
    if close := difflib.get_close_matches(name.lower(), by_lower_case, n=1):
        hint = f"did you mean {by_lower_case[close[0]]}?"
    elif key in OWN_CLASSES:
        hint = f"choose one of {', '.join(known)}, or {hint}"
    return f"no class is known as {name}; {hint}"


def _known_names(key: str) -> list[str]:
    if "scheduler" in key:
        return [*_subclasses(lr_scheduler, LRScheduler), "CosineWithWarmup"]
    if "optimizer" in key:
        return [*_subclasses(torch.optim, Optimizer), *BITSANDBYTES_OPTIMIZERS]
    if key not in OWN_CLASSES:
        return []
    package = importlib.import_module(OWN_CLASSES[key])
    return [name for name in package.__all__ if name.endswith("Module") and name != "StageModule"]


def _subclasses(module: ModuleType, base: type) -> list[str]:
    return [name for name, value in vars(module).items() if _extends(value, base)]


def _resolve_optimizer(cls: Any, name: str) -> str:
    """The import path of a short name; the name itself if nothing is called so.

    Raises:
        ImportError: if the name is one of bitsandbytes', and bitsandbytes cannot be imported.
    """
    if cls is not Optimizer or "." in name:
        return _resolve(cls, name)
    if _extends(getattr(torch.optim, name, None), Optimizer):
        return f"torch.optim.{name}"
    path = _resolve(cls, name)
    if "." in path or not _BITSANDBYTES_NAME.fullmatch(name):
        return path
    try:
        module = importlib.import_module("bitsandbytes.optim")
    except Exception as error:  # a broken installation raises more than ImportError
        raise ImportError(
            f"{name} is an optimizer of bitsandbytes, which cannot be imported ({error}); install it by "
            "`pip install bitsandbytes`, or take torch.optim.AdamW"
        ) from error
    return f"bitsandbytes.optim.{name}" if _extends(getattr(module, name, None), Optimizer) else name


def _extends(value: Any, base: type) -> bool:
    return inspect.isclass(value) and issubclass(value, base) and value is not base
