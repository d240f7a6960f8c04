"""Where a role comes from: the stages that led to it, as far as their folders are still there."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rto_lightning.backbone.roles import ROLE_FILE, RoleCard, looks_like_hub_name
from rto_lightning.runs.metrics_file import read_metrics
from rto_lightning.saved.source import Checkpoint, SavedRole, config_of_role, read_config

METRICS = ("fit", "validate", "test")
"""Commands whose figures are metrics of a stage."""
_LOSSES = {"rdpo": "R-DPO", "simpo": "SimPO"}
_GRANULARITIES = {"token": "RTO", "sentence": "Semi-RTO", "delayed": "DDPO", "shaping": "RS-PPO"}


@dataclass(frozen=True)
class StageRecord:
    """One stage, or an outside model, on the way to a role."""

    title: str
    """What was trained by which method: `RTO`, `DPO`, `reward model`; or the name of an outside model."""
    role: str
    """What it was trained to be."""
    used_as: str
    """What it is to the stage that names it: `start`, `token rewards`, `score`; empty for the exported role."""
    config: Mapping[str, Any] | None = None
    """Its settings, if `config.yaml` is there."""
    card: RoleCard | None = None
    """Its `role.json`, if it is there."""
    folder: Path | None = None
    """The folder of the stage, if there is one."""

    @property
    def arguments(self) -> Mapping[str, Any]:
        """`model.init_args` of its settings."""
        return self.config["model"]["init_args"] if self.config is not None else {}


def lineage(source: SavedRole | Checkpoint, card: RoleCard) -> list[StageRecord]:
    """The stages that led to a role, earliest first; the last one is its own.

    Args:
        source: the role.
        card: what `role.json` says of it.
    """
    config = read_config(source.config) if source.config is not None else None
    folder = source.config.parent if source.config is not None else None
    records: dict[str, StageRecord] = {}
    if config is not None:
        _follow(config, records)
    return [*records.values(), StageRecord(_title(config, card.role), card.role, "", config, card, folder)]


def base_of(records: list[StageRecord], card: RoleCard) -> str:
    """The model from which the first stage started: a hub name or a folder."""
    names = [record.arguments["backbone"]["model"] for record in records if record.arguments]
    return next((name for name in names if not (Path(name) / ROLE_FILE).exists()), card.base_model)


def final_metrics(stage: Path) -> list[tuple[str, float, int]]:
    """Name, last value and step of every metric of the last run of each command, but for durations."""
    found: list[tuple[str, float, int]] = []
    for command in METRICS:
        last: dict[str, tuple[str, float, int]] = {}
        for row in read_metrics(stage, command):
            for name, value in row.items():
                if value and name not in ("epoch", "step") and "second" not in name:
                    last[name] = name, float(value), int(row["step"])
        found += sorted(last.values())
    return found


def _follow(config: Mapping[str, Any], records: dict[str, StageRecord]) -> None:
    """Add what a stage was given, each after what it was given itself."""
    for used_as, name in _given(config["model"]["init_args"]):
        folder = Path(name)
        key = str(folder.resolve())
        if key in records:
            continue
        card = RoleCard.read(folder) if folder.is_dir() else None
        if card is None:
            if used_as != "base" and (folder.is_dir() or looks_like_hub_name(name)):
                records[key] = StageRecord(name, "outside model", used_as)
            continue
        path = config_of_role(folder, card)
        own = read_config(path) if path is not None else None
        if own is not None:
            _follow(own, records)
        start = "start" if used_as == "base" else used_as
        records[key] = StageRecord(_title(own, card.role), card.role, start, own, card, folder.parent)


def _given(arguments: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What each role or model that a stage names is to it, and where it is."""
    backbone, critic = arguments["backbone"], arguments.get("critic") or {}
    named = [
        ("base", backbone["model"]),
        ("start", backbone.get("init")),
        ("start", arguments.get("trained")),
        ("token rewards", arguments.get("dpo")),
        ("reference of the token rewards", arguments.get("dpo_reference")),
        ("score", arguments.get("reward")),
        *(("score", source.get("reward")) for source in arguments.get("more_rewards") or ()),
        ("start of the critic", critic.get("init") if critic.get("init") not in ("reward", "policy") else None),
    ]
    return ((used_as, name) for used_as, name in named if name is not None)


def _title(config: Mapping[str, Any] | None, role: str) -> str:
    if config is None:
        return {"reward": "reward model"}.get(role, role)
    name: str = config["model"]["class_path"].rpartition(".")[2]
    arguments = config["model"]["init_args"]
    if name == "RTOModule":
        return _rto_title(arguments.get("rewards") or {}, arguments.get("ppo") or {})
    if name == "PreferenceModule":
        loss = str(arguments.get("loss", "dpo"))
        return _LOSSES.get(loss, loss.upper())
    return {"SFTModule": "SFT", "RewardModelModule": "reward model"}.get(name, name)


def _rto_title(rewards: Mapping[str, Any], ppo: Mapping[str, Any]) -> str:
    """A method's name: that of its estimator on the score alone, else of where token rewards go and the estimator."""
    estimator = str(ppo.get("estimator", "gae"))
    by_score = {"gae": "PPO", "reinforce++": "REINFORCE++"}.get(estimator, estimator.upper())
    if rewards.get("beta_1") == 0:
        return by_score
    by_tokens = _GRANULARITIES.get(str(rewards.get("granularity", "token")), "RTO")
    return by_tokens if estimator == "gae" else f"{by_tokens}-{by_score}"
