"""How settings are written where others read them: without the paths of this machine."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rto_lightning.backbone import RoleCard


def shown(value: Any) -> str:
    """A setting as text; of an absolute path its last part only: the rest says nothing to a reader elsewhere."""
    if isinstance(value, Mapping) and "class_path" in value:
        arguments = value.get("init_args") or {}
        kept = [f"{key} {shown(arguments[key])}" for key in ("lr", "betas", "weight_decay") if key in arguments]
        return ", ".join([str(value["class_path"]).rpartition(".")[2], *kept])
    if isinstance(value, str) and (Path(value).is_absolute() or value.startswith(("~", ".."))):
        return Path(value).name
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def public_card(card: RoleCard) -> RoleCard:
    """A `role.json` without the statistics of scores that are filed under an absolute path, and found by that only."""
    statistics = {
        name: mean_std
        for name, mean_std in card.settings.get("score_statistics", {}).items()
        if not any(Path(word).is_absolute() for word in name.split())
    }
    settings = (
        {**card.settings, "score_statistics": statistics} if "score_statistics" in card.settings else card.settings
    )
    return replace(card, settings=settings)
