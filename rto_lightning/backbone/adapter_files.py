"""A saved adapter, read as data: settings of a plain LoRA adapter, and the weights of such a one.

PEFT's own reader builds whatever kind of adapter `adapter_config.json` names. Some kinds import a module that the file
names (`megatron_core`), change weights of the base (`init_lora_weights: pissa`, `bias: all`) or its layers
(`layer_replication`), and a weight of the file may be one of the base. On a base that all roles share, none of that
may be.
"""

import math
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rto_lightning.backbone.model_files import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    check_folder,
    read_settings,
    tensor_shapes,
)
from rto_lightning.errors import UserError, first_line

# What gives a LoRA adapter its shape.
_READ = (
    "alpha_pattern",
    "exclude_modules",
    "fan_in_fan_out",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "r",
    "rank_pattern",
    "target_modules",
    "use_dora",
    "use_rslora",
)
# What says where it comes from, or matters in training only.
_LEFT_OUT = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "init_lora_weights",
    "lora_dropout",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
)
_HARMLESS_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
"""Beginnings whose weights the file replaces, while those of the base stay as they are."""
_WEIGHT = re.compile(r"base_model\.model\..+\.lora_(embedding_[AB]|[AB]\.(weight|bias)|magnitude_vector(\.weight)?)")


def read_lora_config(folder: Path) -> LoraConfig:
    """The settings of a saved adapter.

    Args:
        folder: a PEFT folder.

    Raises:
        UserError: if it leads outside of itself, or is no plain LoRA adapter.
    """
    check_folder(folder)
    path = folder / ADAPTER_CONFIG
    saved, plain = read_settings(path), LoraConfig()
    if saved.get("peft_type") != "LORA":
        raise UserError(f"{folder} is an adapter of the kind {saved.get('peft_type')}; only LoRA is loaded.")
    for key, value in saved.items():
        default = getattr(plain, key, None)
        if key not in (*_READ, *_LEFT_OUT) and value and value != default:
            raise UserError(f"{folder} is not a plain LoRA adapter ({key} is set in {path.name}); train it anew.")
    if saved.get("init_lora_weights", True) not in _HARMLESS_INITS:
        raise UserError(
            f"{folder} would change the base model (init_lora_weights is {saved['init_lora_weights']!r}), which other "
            "roles share; convert it to a plain LoRA adapter, as PEFT describes."
        )
    _check_types(saved, path)
    try:
        return LoraConfig(**{key: saved[key] for key in _READ if key in saved}, task_type="CAUSAL_LM")
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} does not describe a LoRA adapter ({first_line(error)}); train it anew.") from error


def read_lora_weights(folder: Path, config: LoraConfig) -> dict[str, Tensor]:
    """The weights of a saved adapter, by their names in the file.

    Args:
        folder: a PEFT folder.
        config: what `read_lora_config` gave for it.

    Raises:
        UserError: if they are not safetensors, if the file is damaged, has weights of anything but LoRA layers, or
            such of another rank than `config`, or if one is not finite.
    """
    path = folder / ADAPTER_FILE
    if not path.exists():
        raise UserError(
            f"{folder} has no {ADAPTER_FILE}; other weight formats can run code and are not loaded: convert it "
            "by PEFT's PeftModel.from_pretrained(BASE, FOLDER).save_pretrained(NEW_FOLDER)."
        )
    shapes = tensor_shapes(path)
    for name in shapes:
        if not _WEIGHT.fullmatch(name):
            raise UserError(f"{path} has the weight {name}, which is none of a LoRA adapter; train it anew.")
    # Before layers of that size are made.
    stored = max(
        (shape[0] for name, shape in shapes.items() if re.search(r"lora_(embedding_)?A", name) and shape), default=0
    )
    rank = max([config.r, *(config.rank_pattern or {}).values()])
    if rank > stored:
        raise UserError(
            f"{folder / ADAPTER_CONFIG} names the rank {rank}, but its weights have {stored}; train it anew."
        )
    return read_tensors(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The floating-point tensors of a small safetensors file.

    Raises:
        UserError: if it is damaged, or has a tensor of another data type or one that is not finite.
    """
    tensor_shapes(path)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is no whole safetensors file ({first_line(error)}); get it anew.") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise UserError(f"{path} has {name} in {tensor.dtype}, which is no data type of weights; train it anew.")
        if not tensor.to(torch.float32).isfinite().all():
            raise UserError(f"{path} has numbers in {name} that are not finite; train it anew.")
    return tensors


def _check_types(saved: dict[str, Any], path: Path) -> None:
    """PEFT takes any value, and fails somewhere later."""
    whole = [saved.get("r", 8), *_values(saved.get("rank_pattern"))]
    numbers = [saved.get("lora_alpha", 8), *_values(saved.get("alpha_pattern"))]
    targets = saved.get("target_modules")
    right = (
        all(type(rank) is int and rank > 0 for rank in whole)
        and all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
        and (isinstance(targets, str) or (isinstance(targets, list) and all(isinstance(name, str) for name in targets)))
    )
    if not right:
        raise UserError(f"{path} does not describe a LoRA adapter (ranks, scales or layers); train it anew.")


def _values(pattern: Any) -> list[Any]:
    if not pattern:
        return []
    return list(pattern.values()) if isinstance(pattern, dict) else [None]
