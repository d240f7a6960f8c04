"""Several LoRA adapters on one base, one of them active at a time.

PEFT's own switches do not fit: `set_adapter` takes the gradients from every other adapter, and leaving
`disable_adapter()` freezes all but the active one. So the two attributes that PEFT's layers read in their forward are
set here, and `requires_grad` is set once, when a role is added. They are private names of PEFT 0.21
(`BaseTunerLayer._active_adapter`, `._disable_adapters`), which is why its version is pinned.
"""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from rto_lightning.backbone.adapter_files import read_lora_config, read_lora_weights
from rto_lightning.backbone.lora import simplify_forward
from rto_lightning.backbone.model_files import ADAPTER_FILE
from rto_lightning.backbone.settings import LoraSettings
from rto_lightning.errors import UserError, first_line


class AdapterBank:
    """The named adapters of one base model.

    The bank holds no module of its own: the adapters live inside the layers of `model`.
    """

    def __init__(self, model: PreTrainedModel, trained_dtype: torch.dtype) -> None:
        self.model = model
        self.trained_dtype = trained_dtype
        self._peft: PeftModel | None = None
        self._layers: list[BaseTunerLayer] = []

    @property
    def names(self) -> list[str]:
        """Names of the adapters, in the order in which they were added."""
        return list(self._peft.peft_config) if self._peft is not None else []

    def add(self, name: str, lora: LoraSettings, trainable: bool) -> None:
        """Add a fresh adapter; its update is zero, so that it starts as the base model."""
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            target_modules=lora.target_modules,
            use_rslora=lora.rank_stabilized,
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        )
        self._add(name, config, trainable)

    def load(self, name: str, folder: Path, trainable: bool) -> None:
        """Add an adapter from a PEFT folder.

        Raises:
            UserError: if the folder is no plain LoRA adapter (see :mod:`rto_lightning.backbone.adapter_files`), or does
                not fit this base.
        """
        config = read_lora_config(folder)
        weights = read_lora_weights(folder, config)
        config.inference_mode = not trainable
        self._add(name, config, trainable)
        assert self._peft is not None
        try:
            result: Any = set_peft_model_state_dict(self._peft, weights, adapter_name=name)
        except RuntimeError as error:
            raise UserError(
                f"the adapter {folder} does not fit the base model {self.model.name_or_path}: its shapes differ."
            ) from error
        missing = [key for key in result.missing_keys if f".{name}." in key]
        for keys, what in ((result.unexpected_keys, "has weights for"), (missing, "lacks weights for")):
            if keys:
                raise UserError(
                    f"the adapter {folder} does not fit the base model {self.model.name_or_path}: it {what} {keys[0]}."
                )

    def copy(self, source: str, name: str, trainable: bool) -> None:
        """Add an adapter with the shape and the weights of another."""
        assert self._peft is not None
        self._add(name, copy.deepcopy(self._peft.peft_config[source]), trainable)
        set_peft_model_state_dict(
            self._peft, get_peft_model_state_dict(self._peft, adapter_name=source), adapter_name=name
        )

    def save(self, name: str, folder: Path, revision: str | None = None) -> None:
        """Write one adapter as a PEFT folder, which names the base model and, if there is one, its revision."""
        assert self._peft is not None
        config: Any = copy.copy(self._peft.peft_config[name])
        config.inference_mode, config.base_model_name_or_path = True, self.model.name_or_path
        config.revision = revision  # by which PEFT loads the base model
        if isinstance(config.target_modules, set):  # in another order in every process
            config.target_modules = sorted(config.target_modules)
        config.save_pretrained(str(folder))
        weights = get_peft_model_state_dict(self._peft, adapter_name=name, save_embedding_layers=False)
        save_file({key: value.detach().cpu().contiguous() for key, value in weights.items()}, folder / ADAPTER_FILE)

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The weights of one adapter."""
        return [
            parameter
            for layer in self._layers
            for attribute in layer.adapter_layer_names
            for key, module in getattr(layer, attribute).items()
            if key == name
            for parameter in module.parameters()
        ]

    def largest_rank(self) -> int:
        """The largest rank of an adapter in any layer; 0 without adapters."""
        return max((rank for layer in self._layers for rank in getattr(layer, "r", {}).values()), default=0)

    def all_parameters(self) -> list[nn.Parameter]:
        """The weights of all adapters."""
        return [parameter for name in self.names for parameter in self.parameters(name)]

    @contextmanager
    def active(self, name: str | None) -> Iterator[None]:
        """Within it, the base model computes with this adapter, or with none; gradients of all adapters stay on."""
        before = [(layer._active_adapter, layer._disable_adapters) for layer in self._layers]
        for layer in self._layers:
            layer._disable_adapters = name is None
            if name is not None:
                layer._active_adapter = [name]
        try:
            yield
        finally:
            for layer, (active, disabled) in zip(self._layers, before, strict=True):
                layer._active_adapter, layer._disable_adapters = active, disabled

    def _add(self, name: str, config: PeftConfig, trainable: bool) -> None:
        trained = {existing for existing in self.names if any(p.requires_grad for p in self.parameters(existing))}
        try:
            if self._peft is None:
                self._peft = PeftModel(self.model, config, adapter_name=name)
            else:
                self._peft.add_adapter(name, config)
        except (ValueError, TypeError, RuntimeError, re.error) as error:
            raise UserError(
                f"the adapter {name} cannot be put on {self.model.name_or_path}: {first_line(error)}."
            ) from error
        self._layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        for layer in self._layers:
            simplify_forward(layer)
        # Adding an adapter resets the gradients of the others; state them for all, so that order does not matter.
        self.model.requires_grad_(False)
        for existing in self.names:
            for parameter in self.parameters(existing):
                parameter.data = parameter.data.to(self.trained_dtype)
                parameter.requires_grad_(trainable if existing == name else existing in trained)
