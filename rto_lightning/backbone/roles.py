"""What a role is, and the small JSON file that travels with a saved one."""

import json
import math
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from rto_lightning.backbone.model_files import ADAPTER_CONFIG, check_folder, read_settings
from rto_lightning.backbone.settings import BackboneSettings
from rto_lightning.errors import MissingInputError, UserError
from rto_lightning.runs.folder import ROLE_FOLDER
from rto_lightning.secrets import mask_settings

ROLE_FILE = "role.json"
FORMAT = 1
STAGE_OF_ROLE = {"policy": "sft", "dpo": "dpo", "reward": "reward_model"}


@dataclass(frozen=True)
class Role:
    """How one role is played: which model, with which adapter, read through which head."""

    name: str
    """`policy`, `policy_average`, `reference`, `dpo`, `dpo_reference`, `reward` (`reward_2` and so on) or `critic`."""
    model: str
    """Key of the model in the backbone: `base`, or the role's own name for a model of its own."""
    adapter: str | None
    """Name of the adapter on that model; None computes without one."""
    trainable: bool
    """Whether its own weights change in training, and so are held in full precision and belong into a checkpoint."""
    body_of: str | None = None
    """The role whose model and adapter it reads; only its head is then its own."""


@dataclass
class RoleCard:
    """The contents of `role.json`: where a saved role comes from and what it can be used with."""

    role: str
    """What the weights were trained to be: `policy`, `dpo`, `reward` or `critic`."""
    kind: str
    """`adapter` (a PEFT folder on a base) or `model` (a Hugging Face folder of its own)."""
    base_model: str
    """Hub name or folder of the base model of the run that trained it."""
    base_revision: str | None
    """Revision of the base model on the hub."""
    base_fingerprint: str
    """Tells base models apart, whatever their folder is called."""
    vocabulary_fingerprint: str
    """Tells vocabularies apart."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What the role was trained with and a reader needs, such as `beta` and `loss` of DPO."""
    score_mean: float | None = None
    """Mean score of answers of the reference policy (reward roles)."""
    score_std: float | None = None
    """Standard deviation of those scores (reward roles)."""
    init_fingerprint: str | None = None
    """The SFT adapter that was the reference of the run that trained it; null for the base model."""
    format: int = FORMAT
    """Version of this file."""

    def write(self, folder: Path) -> None:
        """Write `role.json` into the folder, with secrets masked."""
        contents = json.dumps(mask_settings(asdict(self)), indent=2)
        (folder / ROLE_FILE).write_text(contents + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "RoleCard | None":
        """The card of a saved role, or None for a folder that has no `role.json`.

        Raises:
            UserError: if the folder leads outside of itself, or if the file is damaged or was written by a newer
                version.
        """
        path = folder / ROLE_FILE
        if not path.exists() and not path.is_symlink():
            return None
        check_folder(folder)
        contents = read_settings(path)
        if contents.get("format") != FORMAT:
            raise UserError(
                f"{path} has format {contents.get('format')}, this version reads {FORMAT}; update rto-lightning."
            )
        wanted = {entry.name: entry for entry in fields(cls)}
        for name, entry in wanted.items():
            missing = name not in contents and entry.default is MISSING and entry.default_factory is MISSING
            if missing or (name in contents and not _fits(contents[name], entry.type)):
                raise UserError(f"{path} is damaged (it has no {name} of the right kind); save the role again.")
        unknown = contents.keys() - wanted.keys()
        if unknown:
            raise UserError(f"{path} is damaged (it has the unknown key {min(unknown)!r}); save the role again.")
        card = cls(**contents)
        kind = "adapter" if (folder / ADAPTER_CONFIG).exists() else "model"
        if card.kind != kind:
            raise UserError(
                f"{path} says that the folder holds the kind {card.kind}, which it does not; save it again."
            )
        statistics = card.settings.get("score_statistics", {})
        stated = [] if card.score_std is None else [(card.score_mean, card.score_std)]
        if not isinstance(statistics, dict) or not all(map(_is_mean_and_std, [*statistics.values(), *stated])):
            raise UserError(f"{path} is damaged (its statistics of scores are none); save the role again.")
        return card

    def check_kind(self, kind: str, source: str) -> None:
        """Refuse a saved role that was trained to be something else.

        Args:
            kind: what it is to be: `policy`, `dpo` or `reward`.
            source: where it was saved.

        Raises:
            UserError: with both kinds.
        """
        if self.role != kind:
            raise UserError(
                f"{source} was saved as the role {self.role} and cannot be used as {kind}; name the right folder."
            )

    def check_base(
        self, name: str, source: str, model: str, vocabulary_fingerprint: str, base_fingerprint: Callable[[], str]
    ) -> None:
        """Refuse a saved role that was trained on another vocabulary or on another base.

        Args:
            name: the role it is to be.
            source: where it was saved.
            model: base model of this run.
            vocabulary_fingerprint: that of this run.
            base_fingerprint: gives that of this run; called for adapters only, since it reads the model's files.

        Raises:
            UserError: with both names.
        """
        if self.vocabulary_fingerprint != vocabulary_fingerprint:
            raise UserError(
                f"the {name} role {source} was trained on {self.base_model}, whose vocabulary differs from that of "
                f"{model}; set model.backbone.model to {self.base_model} or train the role again."
            )
        if self.kind == "adapter" and self.base_fingerprint != base_fingerprint():
            raise UserError(
                f"the {name} role {source} is an adapter on {self.base_model}, but this run's base model is "
                f"{model}, whose weights differ; set model.backbone.model to {self.base_model} or train the role again."
            )


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value of `role.json` is of the type of its field."""
    types = get_args(annotation) if isinstance(annotation, UnionType) else (get_origin(annotation) or annotation,)
    return isinstance(value, (*types, int) if float in types else types)


def _is_mean_and_std(values: Any) -> bool:
    if not isinstance(values, list | tuple) or len(values) != 2:
        return False
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values) and values[1] > 0


def kind_of_role(name: str) -> str:
    """What a role was trained to be: `reward` for `reward_2`."""
    kind, _, number = name.rpartition("_")
    return kind if number.isdigit() else name


def looks_like_hub_name(source: str) -> bool:
    """Whether `source` reads as owner/name, and the owner is not a folder here."""
    return source.count("/") == 1 and not source.startswith((".", "/", "~")) and not Path(source).parent.exists()


def role_folder(source: str, role: str, stage: str | None = None) -> Path | None:
    """The local folder of a saved role, or None if `source` looks like a hub name.

    Args:
        source: folder or hub name.
        role: what it is to be used as.
        stage: the stage that makes it; null for the usual one of the role.

    Raises:
        MissingInputError: if `source` is a path of which nothing exists; names the stage that makes it.
        UserError: if `source` is the folder of a stage, in which the role lies.
    """
    folder = Path(source)
    if folder.is_dir():
        if (folder / ROLE_FOLDER).is_dir() and not (folder / ROLE_FILE).exists():
            raise UserError(f"{source} is the folder of a stage; its role is {folder / ROLE_FOLDER}.")
        return folder
    if looks_like_hub_name(source):
        return None
    stage = stage or STAGE_OF_ROLE.get(kind_of_role(role), "sft")
    raise MissingInputError(f"the {role} role {source} does not exist; the {stage} stage makes it.", stage=stage)


def check_init(settings: BackboneSettings) -> None:
    """Refuse an `init` from which policy and reference cannot start.

    Raises:
        MissingInputError: if it does not exist.
        UserError: if it is no adapter, or every weight is trained.
    """
    assert settings.init is not None
    folder = role_folder(settings.init, "policy")
    if folder is None or not (folder / ADAPTER_CONFIG).exists():
        raise UserError(f"model.backbone.init {settings.init} is no adapter; set model.backbone.model to it instead.")
    if settings.mode == "full":
        raise UserError("model.backbone.init is an adapter, which mode full does not train; use mode adapters.")
