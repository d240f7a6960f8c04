"""Where a role lies: saved as one, or in the checkpoint of a stage.

The folder of a stage stands for its `role/`; where training has not ended there is none, and it stands for the last
checkpoint. A checkpoint is a file, or a folder to which every rank wrote its shards; the settings of its run are looked
for above it.
"""

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rto_lightning.backbone.roles import ROLE_FILE, RoleCard, role_folder
from rto_lightning.backbone.shard_files import INDEX_FILE
from rto_lightning.errors import UserError
from rto_lightning.runs.folder import CHECKPOINTS, ROLE_FOLDER, config_files, last_checkpoint

OWN_CODE = ("rto_lightning", "torch.optim", "bitsandbytes.optim")
"""Packages from which the settings of a run may name classes, wherever they come from."""


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


def find_source(given: Path, role: str | None = None, trusted: bool = False) -> SavedRole | Checkpoint:
    """Find what a path and a role mean.

    Args:
        given: the folder of a stage, the folder of a role, or a checkpoint.
        role: which role of a stage; None is the one that it trains and saves.
        trusted: whether to import what the settings of a run name; see :func:`check_code`.

    Raises:
        MissingInputError: if a role that the stage was given does not exist any more.
        UserError: if nothing can be opened there, or not this role.
    """
    if not given.exists():
        raise UserError(f"{given} does not exist; give the folder of a stage, a role/ folder or a checkpoint.")
    if (given / ROLE_FILE).exists():
        return _saved_role(given, role, trusted)
    if given.is_file() or (given / INDEX_FILE).exists():
        return _role_of_stage(_config_above(given), role, lambda: given, trusted)
    config = stage_config(given)
    saved = given / ROLE_FOLDER
    if config is None:
        if (saved / ROLE_FILE).exists():
            return _saved_role(saved, role, trusted)
        raise UserError(
            f"{given} holds neither {ROLE_FILE} nor config.yaml; give the folder of a stage, a role/ folder or a "
            "checkpoint."
        )
    if (saved / ROLE_FILE).exists() and (role is None or role == role_of_config(read_config(config), config, trusted)):
        return _saved_role(saved, role, trusted)
    return _role_of_stage(config, role, lambda: _last_checkpoint(given), trusted)


def stage_config(stage: Path) -> Path | None:
    """The settings of the latest training in a stage's folder; None without any."""
    return next(reversed(config_files(stage)), None)


def config_of_role(folder: Path, card: RoleCard, trusted: bool = False) -> Path | None:
    """The settings of the stage that saved a role, if it still lies in the folder of that stage."""
    config = stage_config(folder.parent)
    try:
        if config is None or role_of_config(read_config(config), config, trusted) != card.role:
            return None
        return config
    except (UserError, ImportError, AttributeError):  # another program's file, or a stage that is not installed
        return None


def read_config(path: Path) -> dict[str, Any]:
    """The contents of a `config.yaml`.

    Raises:
        UserError: if it holds no stage.
    """
    try:
        contents: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} is no YAML file; give the folder of a stage.") from error
    try:
        _ = contents["model"]["class_path"], contents["model"]["init_args"]["backbone"]["model"]
    except (TypeError, KeyError) as error:
        raise UserError(f"{path} holds no settings of a stage; give the folder of a stage.") from error
    return contents


def check_code(settings: Any, path: Path) -> None:
    """Refuse settings whose classes are not part of this project, of torch's or bitsandbytes' optimizers or imported.

    To find a class, its module is imported, and whatever module a file names is run by that.

    Args:
        settings: the contents of a `config.yaml`, or a part of them.
        path: where they are from.

    Raises:
        UserError: with the class.
    """
    waiting: list[Any] = [settings]
    seen: set[int] = set()  # an alias of YAML may stand for the same part in many places
    while waiting:
        value = waiting.pop()
        if id(value) in seen or not isinstance(value, Mapping | list):
            continue
        seen.add(id(value))
        waiting += value.values() if isinstance(value, Mapping) else value
        name = str(value.get("class_path", "")) if isinstance(value, Mapping) else ""
        module = name.rpartition(".")[0]
        own = any(module == package or module.startswith(f"{package}.") for package in OWN_CODE)
        if module and not own and module not in sys.modules:
            raise UserError(
                f"{path} names the class {name}, whose code is not part of rto-lightning; if it is yours, add "
                "--trust_remote_code."
            )


def stage_class(config: Mapping[str, Any], path: Path, trusted: bool = False) -> Any:
    """The class of the stage that a `config.yaml` describes.

    Args:
        config: its contents.
        path: where they are from.
        trusted: whether to import the module that it names, whatever it is.

    Raises:
        UserError: if it names a module that is not part of this project, and is not trusted.
    """
    if not trusted:
        check_code({"class_path": config["model"]["class_path"]}, path)
    module, _, name = str(config["model"]["class_path"]).rpartition(".")
    return getattr(importlib.import_module(module), name)


def role_of_config(config: Mapping[str, Any], path: Path, trusted: bool = False) -> str:
    """The role that a stage trains and saves; arguments and errors as for :func:`stage_class`."""
    role: str = stage_class(config, path, trusted).saved_as
    return role


def _saved_role(folder: Path, role: str | None, trusted: bool) -> SavedRole:
    card = RoleCard.read(folder)
    assert card is not None
    if role not in (None, card.role):
        raise UserError(f"{folder} is the role {card.role}, not {role}; name another folder.")
    return SavedRole(folder, card, config_of_role(folder, card, trusted))


def _role_of_stage(config: Path, role: str | None, checkpoint: Any, trusted: bool) -> SavedRole | Checkpoint:
    """A role of the stage that `config` describes; `checkpoint()` finds its state in training."""
    settings = read_config(config)
    own, given = role_of_config(settings, config, trusted), settings["model"]["init_args"]
    if role in (None, own):
        return Checkpoint(checkpoint(), config, critic=False)
    if role == "critic" and given.get("critic") is not None:
        return Checkpoint(checkpoint(), config, critic=True)
    source = given.get(role)
    if source is None:
        raise UserError(f"the stage of {config} has no role {role}, and trains {own}; name that or another stage.")
    folder = role_folder(source, role or own)
    if folder is None or not (folder / ROLE_FILE).exists():
        raise UserError(f"the {role} role of {config} is the outside model {source}; nothing of it was trained.")
    return _saved_role(folder, role, trusted)


def _config_above(checkpoint: Path) -> Path:
    for folder in checkpoint.resolve().parents[:2]:
        if (config := stage_config(folder)) is not None:
            return config
    raise UserError(
        f"there is no config.yaml beside {checkpoint} or in the folder above; leave a checkpoint in the folder of its "
        "stage."
    )


def _last_checkpoint(stage: Path) -> Path:
    """The one that resuming by `--ckpt_path last` takes; without such, the newest of a `ModelCheckpoint`."""
    if (last := last_checkpoint(stage)) is not None:
        return last
    folder = stage / CHECKPOINTS
    found = [path for path in folder.glob("*.ckpt") if path.exists()]  # a link may lead nowhere
    if not found:
        raise UserError(f"{stage} has no role/ and no checkpoint in {folder}; train the stage, or name a checkpoint.")
    return max(found, key=lambda path: path.stat().st_mtime)
