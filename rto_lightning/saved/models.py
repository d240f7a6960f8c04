"""A model that answers, or one that scores, from wherever it was saved: on the CPU, and only to be read."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from rto_lightning.backbone import BackboneSettings, PolicyBackbone, load_chat_tokenizer
from rto_lightning.backbone.loading import load_config
from rto_lightning.backbone.roles import ROLE_FILE, looks_like_hub_name
from rto_lightning.errors import UserError
from rto_lightning.modules import StageModule
from rto_lightning.saved.opening import OpenedRole, open_role
from rto_lightning.saved.source import find_source

LoadModule = Callable[[Path], StageModule]


def is_whole_model(source: str) -> bool:
    """Whether this is no role of a run: a folder of a whole model, or a name of the hub."""
    path = Path(source)
    return looks_like_hub_name(source) or ((path / "config.json").exists() and not (path / ROLE_FILE).exists())


def open_policy(
    source: str, load_module: LoadModule, exact: bool = True, base_model: str | None = None
) -> tuple[PolicyBackbone, str]:
    """A backbone with a role that answers, and the role's name.

    Args:
        source: folder of a stage, folder of a role, checkpoint, or folder or hub name of a whole model.
        load_module: builds the stage of a `config.yaml`.
        exact: hold frozen weights in float32; else in the data type of their files.
        base_model: where the base model of an adapter is now.

    Raises:
        UserError: if it cannot be loaded, or is a role that only scores.
    """
    if is_whole_model(source):
        dtype: Literal["float32", "bfloat16"] = "float32" if exact or not _is_bfloat16(source) else "bfloat16"
        settings = BackboneSettings(model=source, dtype=dtype)
        backbone, name = PolicyBackbone(settings, load_chat_tokenizer(settings)), "reference"
        backbone.add_role(name)
    else:
        opened = open_role(find_source(Path(source)), exact, base_model, load_module)
        if opened.head is not None:
            raise UserError(f"{source} is the role {opened.name}, which scores answers and gives none; name a policy.")
        backbone, name = opened.backbone, opened.name
    backbone.requires_grad_(False).eval()
    return backbone, name


def open_reward_role(
    source: Path, load_module: LoadModule, exact: bool = True, base_model: str | None = None
) -> OpenedRole:
    """A role that scores responses; arguments as for :func:`open_policy`.

    Raises:
        UserError: if it cannot be loaded, or has no scalar head.
    """
    opened = open_role(find_source(source, "reward"), exact, base_model, load_module)
    if opened.head is None:
        raise UserError(f"{source} has no scalar head; name a saved reward role.")
    return opened


def _is_bfloat16(model: str) -> bool:
    return str(load_config(model).dtype).removeprefix("torch.") == "bfloat16"
