"""Saved roles for later stages to load, without training them."""

from pathlib import Path
from typing import Any

import torch

from rto_lightning.backbone import BackboneSettings, PolicyBackbone, load_chat_tokenizer
from tests.models import LORA, randomize


def save_random_role(model: Path, folder: Path, name: str, **changes: Any) -> str:
    """Saves an adapter with random weights as the role `policy`, `dpo` or `reward` of a model.

    Args:
        model: The base model.
        folder: Where to.
        name: The role.
        **changes: Settings of the backbone; with mode `full` the role is a model of its own.

    Returns:
        The folder, as settings take it.
    """
    settings = BackboneSettings(str(model), **{"lora": LORA, **changes})
    backbone = PolicyBackbone(settings, load_chat_tokenizer(settings))
    backbone.add_role(name, trainable=True, scalar_head=name == "reward")
    with torch.random.fork_rng():
        randomize(backbone.trained_parameters(name))
    card = backbone.card(name, name, {})
    if name == "reward":
        card.score_mean, card.score_std = 0.5, 2.0
    backbone.save_role(name, folder, card)
    return str(folder)
