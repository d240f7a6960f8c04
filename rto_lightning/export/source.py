"""What an export starts from: a saved role, or the checkpoint of a stage.

The folder of a stage stands for its `role/`; where training has not ended there is none, and it stands for the last
checkpoint. A checkpoint is a file, or a folder to which every rank wrote its shards; the settings of its run are looked
for above it.
"""

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rto_lightning.backbone.roles import ROLE_FILE, RoleCard, role_folder
from rto_lightning.errors import UserError

SHARDS_FILE = ".metadata"
"""Index of a sharded checkpoint, as `torch.distributed.checkpoint` names it."""

_CONFIG = re.compile(r"config(?:-(\d+))?\.yaml")


@dataclass(frozen=True)
class SavedRole:
    """A role that a stage has saved."""

    folder: Path
    """Where its `role.json` is."""
    card: RoleCard
    """The contents of that file."""
    config: Path | None
    """The settings of the run that trained it, if they are still there."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a stage in training."""

    path: Path
    """A file, or a folder of shards."""
    config: Path
    """The settings of the run."""
    critic: bool
    """Whether the critic is meant, not the role that the stage saves."""


def find_source(given: Path, role: str | None = None) -> SavedRole | Checkpoint:
    """Find what a path and a role mean.

    Args:
        given: the folder of a stage, the folder of a role, or a checkpoint.
        role: which role of a stage; None is the one that it trains and saves.

    Raises:
        MissingInputError: if a role that the stage was given does not exist any more.
        UserError: if nothing can be exported from there, or not this role.
    """
    if not given.exists():
        raise UserError(f"{given} does not exist; give the folder of a stage, a role/ folder or a checkpoint.")
    if (given / ROLE_FILE).exists():
        return _saved_role(given, role)
    if given.is_file() or (given / SHARDS_FILE).exists():
        return _role_of_stage(_config_above(given), role, lambda: given)
    config = stage_config(given)
    saved = given / "role"
    if config is None:
        if (saved / ROLE_FILE).exists():
            return _saved_role(saved, role)
        raise UserError(
            f"{given} holds neither {ROLE_FILE} nor config.yaml; give the folder of a stage, a role/ folder or a "
            "checkpoint."
        )
    if (saved / ROLE_FILE).exists() and role in (None, role_of_config(read_config(config))):
        return _saved_role(saved, role)
    return _role_of_stage(config, role, lambda: _last_checkpoint(given))


def stage_config(stage: Path) -> Path | None:
    """The settings of the latest training in a stage's folder; a second one there wrote `config-2.yaml`."""
    found = {path: match for path in stage.glob("config*.yaml") if (match := _CONFIG.fullmatch(path.name))}
    return max(found, key=lambda path: int(found[path][1] or 1), default=None)


def config_of_role(folder: Path, card: RoleCard) -> Path | None:
    """The settings of the stage that saved a role, if it still lies in the folder of that stage."""
    config = stage_config(folder.parent)
    try:
        return config if config is not None and role_of_config(read_config(config)) == card.role else None
    except (UserError, ImportError, AttributeError):  # another program's file, or a stage that is not installed
        return None


def read_config(path: Path) -> dict[str, Any]:
    """The contents of a `config.yaml`.

    Raises:
        UserError: if it holds no stage.
    """
    contents = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        _ = contents["model"]["class_path"], contents["model"]["init_args"]["backbone"]["model"]
    except (TypeError, KeyError) as error:
        raise UserError(f"{path} holds no settings of a stage; give the folder of a stage.") from error
    return contents


def stage_class(config: Mapping[str, Any]) -> Any:
    """The class of the stage that a `config.yaml` describes."""
    module, _, name = config["model"]["class_path"].rpartition(".")
    return getattr(importlib.import_module(module), name)


def role_of_config(config: Mapping[str, Any]) -> str:
    """The role that a stage trains and saves."""
    role: str = stage_class(config).saved_as
    return role


def _saved_role(folder: Path, role: str | None) -> SavedRole:
    card = RoleCard.read(folder)
    assert card is not None
    if role not in (None, card.role):
        raise UserError(f"{folder} is the role {card.role}, not {role}; leave --role out or name another folder.")
    return SavedRole(folder, card, config_of_role(folder, card))


def _role_of_stage(config: Path, role: str | None, checkpoint: Any) -> SavedRole | Checkpoint:
    """A role of the stage that `config` describes; `checkpoint()` finds its state in training."""
    settings = read_config(config)
    own, given = role_of_config(settings), settings["model"]["init_args"]
    if role in (None, own):
        return Checkpoint(checkpoint(), config, critic=False)
    if role == "critic" and given.get("critic") is not None:
        return Checkpoint(checkpoint(), config, critic=True)
    source = given.get(role)
    if source is None:
        raise UserError(f"the stage of {config} has no role {role}; it trains {own}, so leave --role out.")
    folder = role_folder(source, role or own)
    if folder is None or not (folder / ROLE_FILE).exists():
        raise UserError(f"the {role} role of {config} is the outside model {source}; there is nothing to export.")
    return _saved_role(folder, role)


def _config_above(checkpoint: Path) -> Path:
    for folder in checkpoint.resolve().parents[:2]:
        if (config := stage_config(folder)) is not None:
            return config
    raise UserError(
        f"there is no config.yaml beside {checkpoint} or in the folder above; leave a checkpoint in the folder of its "
        "stage."
    )


def _last_checkpoint(stage: Path) -> Path:
    """The one that resuming by `--ckpt_path last` takes; without such, the newest."""
    folder = stage / "checkpoints"
    found = list(folder.glob("last*.ckpt")) or list(folder.glob("*.ckpt"))
    if not found:
        raise UserError(f"{stage} has no role/ and no checkpoint in {folder}; train the stage, or name a checkpoint.")
    return max(found, key=lambda path: path.stat().st_mtime)
