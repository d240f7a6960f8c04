"""A model that answers, or that scores answers, from wherever it was saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from rto_lightning.backbone import BackboneSettings, PolicyBackbone, load_chat_tokenizer
from rto_lightning.backbone.loading import load_config
from rto_lightning.backbone.roles import ROLE_FILE, looks_like_hub_name
from rto_lightning.errors import UserError
from rto_lightning.export.opening import open_role
from rto_lightning.export.source import find_source
from rto_lightning.modules import StageModule

LoadModule = Callable[[Path], StageModule]
Dtype = Literal["float32", "auto"]
"""Of frozen weights; `auto` is as they are stored."""


def is_whole_model(source: str) -> bool:
    """Whether this is no role of a run: a folder of a whole model, or a name of the hub."""
    path = Path(source)
    return looks_like_hub_name(source) or ((path / "config.json").exists() and not (path / ROLE_FILE).exists())


def open_policy(
    source: str,
    load_module: LoadModule,
    dtype: Dtype = "float32",
    base_model: str | None = None,
    device: str | None = None,
) -> tuple[PolicyBackbone, str]:
    """A backbone with a role that answers, and the role's name.

    Args:
        source: folder of a stage, folder of a role, checkpoint, or folder or hub name of a whole model.
        load_module: builds the stage of a `config.yaml`.
        dtype: of frozen weights.
        base_model: where the base model of an adapter is now.
        device: where it computes; None takes a GPU if there is one.

    Raises:
        UserError: if it cannot be loaded, or is a role that only scores.
    """
    if is_whole_model(source):
        stored: Literal["float32", "bfloat16"] = "bfloat16" if dtype == "auto" and _is_bfloat16(source) else "float32"
        settings = BackboneSettings(model=source, dtype=stored)
        backbone, name = PolicyBackbone(settings, load_chat_tokenizer(settings)), "reference"
        backbone.add_role(name)
    else:
        opened = open_role(find_source(Path(source)), dtype == "float32", base_model, load_module)
        if opened.head is not None:
            raise UserError(f"{source} is the role {opened.name}, which scores answers and gives none; name a policy.")
        backbone, name = opened.backbone, opened.name
    backbone.requires_grad_(False).eval()
    move(backbone, device)
    return backbone, name


def move(module: torch.nn.Module, device: str | None) -> torch.device:
    """Move a model to a device; None is a GPU if there is one.

    Raises:
        UserError: if there is no such device.
    """
    found = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        module.to(found)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise UserError(f"the device {found} cannot be used: {str(error).splitlines()[0]}") from error
    return torch.device(found)


def _is_bfloat16(model: str) -> bool:
    return str(load_config(model).dtype).removeprefix("torch.") == "bfloat16"
