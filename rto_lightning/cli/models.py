"""The models that a command names by its options, loaded and on the device where they compute."""

import argparse
from pathlib import Path

import torch

from rto_lightning.backbone import PolicyBackbone
from rto_lightning.cli.opening import load_stage_module
from rto_lightning.errors import UserError, first_line
from rto_lightning.rewards.remote import ServedRole
from rto_lightning.saved.models import open_policy, open_reward_role


def load_policy(options: argparse.Namespace) -> tuple[PolicyBackbone, str]:
    """A backbone with the role `options.source`, which answers, and its name there; errors as :func:`open_policy`."""
    exact = options.dtype == "float32"
    backbone, name = open_policy(str(options.source), load_stage_module, exact, options.base_model)
    move(backbone, options.device)
    return backbone, name


def load_reward_role(source: str | Path, options: argparse.Namespace) -> ServedRole:
    """A role that scores; errors as :func:`open_reward_role`."""
    opened = open_reward_role(Path(source), load_stage_module, options.dtype == "float32", options.base_model)
    move(opened.backbone, options.device)
    return ServedRole(opened.backbone, opened.name, options.batch_size)


def move(module: torch.nn.Module, device: str | None) -> torch.device:
    """Moves a model to a device; None is a GPU if there is one.

    Raises:
        UserError: if there is no such device.
    """
    found = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        module.to(found)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise UserError(f"the device {found} cannot be used ({first_line(error)}); choose another --device.") from error
    return torch.device(found)
