"""Reinforced Token Optimization (RTO) for language models on PyTorch Lightning.

What a notebook needs can be imported from here: the base model with its roles, the stages, their data, and token
rewards. A name is loaded when it is first asked for, so that importing the package, and the command, stays quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rto_lightning.backbone import BackboneSettings, PolicyBackbone, Sequences, load_chat_tokenizer
    from rto_lightning.data import DemonstrationDataModule, PreferenceDataModule, PromptDataModule
    from rto_lightning.inspection import TokenRewardPage, TokenRewardReader, open_dpo_role
    from rto_lightning.modules import PreferenceModule, RewardModelModule, RTOModule, SFTModule

__version__ = "0.1.0"

__all__ = [
    "BackboneSettings",
    "DemonstrationDataModule",
    "PolicyBackbone",
    "PreferenceDataModule",
    "PreferenceModule",
    "PromptDataModule",
    "RTOModule",
    "RewardModelModule",
    "SFTModule",
    "Sequences",
    "TokenRewardPage",
    "TokenRewardReader",
    "load_chat_tokenizer",
    "open_dpo_role",
]

_PLACES = {
    "rto_lightning.backbone": ("BackboneSettings", "PolicyBackbone", "Sequences", "load_chat_tokenizer"),
    "rto_lightning.data": ("DemonstrationDataModule", "PreferenceDataModule", "PromptDataModule"),
    "rto_lightning.inspection": ("TokenRewardPage", "TokenRewardReader", "open_dpo_role"),
    "rto_lightning.modules": ("PreferenceModule", "RTOModule", "RewardModelModule", "SFTModule"),
}


def __getattr__(name: str) -> Any:
    for place, names in _PLACES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(place), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
