"""The roles of RLHF on one base model: how they get there, who plays when, and how they are saved."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from rto_lightning.backbone.adapters import AdapterBank
from rto_lightning.backbone.chat import ChatTokenizer
from rto_lightning.backbone.cpu_linear import onednn_is_faster, use_onednn
from rto_lightning.backbone.fingerprints import base_fingerprint
from rto_lightning.backbone.heads import HEAD_FILE, ScalarHead, freeze_unused_output_layer
from rto_lightning.backbone.loading import (
    check_same_vocabulary,
    check_tokenizer,
    context_length,
    load_causal_lm,
    save_model,
)
from rto_lightning.backbone.model_files import ADAPTER_CONFIG
from rto_lightning.backbone.roles import Role, RoleCard, kind_of_role, role_folder
from rto_lightning.backbone.settings import BackboneSettings
from rto_lightning.backbone.sharding import Sharding, copy_model, whole_weights
from rto_lightning.errors import UserError
from rto_lightning.parallel import gather_objects, rank

BASE = "base"


class RoleBank(nn.Module):
    """The base model and the roles on it; :class:`PolicyBackbone` asks them.

    Args:
        settings: which model, how its weights are held, and what is trained.
        chat: the tokenizer of the base model.
        device: where quantized weights are put; others are moved by the trainer.

    Raises:
        UserError: if settings contradict each other or the model cannot be loaded.
    """

    def __init__(self, settings: BackboneSettings, chat: ChatTokenizer, device: torch.device | None = None) -> None:
        super().__init__()
        if settings.quantization and settings.mode == "full":
            raise UserError(
                "quantization does not go with mode full because 4-bit weights are not trained; use mode adapters."
            )
        self.settings = settings
        self.chat = chat
        self.models = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        self.roles: dict[str, Role] = {}
        self.cards: dict[str, RoleCard] = {}
        self._device = device
        self._adapters: AdapterBank | None = None

    @property
    def adapters(self) -> AdapterBank:
        """The adapters on the base model, which is loaded when it is first needed."""
        if self._adapters is None:
            base = self._load_model(
                self.settings.model, self.settings.frozen_dtype, self.settings.quantization is not None
            )
            self.models[BASE] = base
            self._adapters = AdapterBank(base, self.settings.trained_dtype)
        return self._adapters

    @cached_property
    def fingerprint(self) -> str:
        """Tells base models apart; see :func:`base_fingerprint`."""
        return base_fingerprint(self.settings.model, self.settings.revision)

    # Roles -----------------------------------------------------------------------------------------------------

    def add_role(
        self, name: str, source: str | None = None, trainable: bool = False, scalar_head: bool = False
    ) -> None:
        """Add a role from a saved role, an outside model, or the base model.

        Args:
            name: the role; any name that is not taken.
            source: folder of a saved role or adapter, or folder or hub name of a model with the same vocabulary. None
                starts from the base model: the base itself if frozen, else a fresh adapter or a copy of it.
            trainable: whether its weights receive gradients.
            scalar_head: read it through a scalar head (reward, critic), which is loaded with the role if it was saved
                with one and starts as zeros otherwise.

        Raises:
            MissingInputError: if the source does not exist.
            UserError: if the role belongs to another base or another vocabulary, or a frozen one is of another kind.
        """
        if name in self.roles:
            raise ValueError(f"the role {name} is there already")
        folder = role_folder(source, name) if source is not None else None
        card = RoleCard.read(folder) if folder is not None else None
        if card is not None:
            if not trainable and kind_of_role(name) in ("dpo", "reward"):  # a trained role may start as any other
                card.check_kind(kind_of_role(name), source or "")
            card.check_base(name, source or "", self.settings.model, self.chat.fingerprint, lambda: self.fingerprint)
            self.cards[name] = card
        if folder is not None and (folder / ADAPTER_CONFIG).exists():
            if self.settings.mode == "full" and trainable:
                raise UserError(f"{source} is an adapter, which mode full does not train; use mode adapters.")
            self.adapters.load(name, folder, trainable)
            self.roles[name] = Role(name, BASE, name, trainable)
        elif source is not None or (trainable and self.settings.mode == "full"):
            if trainable and self.settings.mode == "adapters":
                raise UserError(
                    f"{source} is a full model; set model.backbone.model to it, or model.backbone.mode to full."
                )
            self._add_model(name, source, trainable)
            self.roles[name] = Role(name, name, None, trainable)
        else:
            self._add_on_base(name, trainable)
        if scalar_head:
            self._add_head(name, folder, trainable)

    def copy_role(self, source: str, name: str, trainable: bool, scalar_head: bool = False) -> None:
        """Add a role that starts with the weights of another one, head included if both have one."""
        original = self.roles[source]
        if original.adapter is not None and original.model == BASE:
            self.adapters.copy(original.adapter, name, trainable)
            self.roles[name] = Role(name, BASE, name, trainable)
        elif original.model == BASE and (self.settings.mode == "adapters" or not trainable):
            self._add_on_base(name, trainable)
        else:
            if original.model == BASE:  # loaded anew: the base in memory may hold adapters of other roles
                self._add_model(name, None, trainable)
            else:
                model = copy_model(self.models[original.model])
                dtype = self.settings.trained_dtype if trainable else self.settings.frozen_dtype
                self.models[name] = model.to(dtype).requires_grad_(trainable)
            self.roles[name] = Role(name, name, None, trainable)
        if scalar_head:
            self._add_head(name, None, trainable)
            if source in self.heads:
                self.heads[name].load_state_dict(self.heads[source].state_dict())

    def share_role(self, source: str, name: str) -> None:
        """Add a role that is a scalar head, of zeros, on the hidden states of another one."""
        self.roles[name] = replace(self.roles[source], name=name, body_of=source)
        self._add_head(name, None, trainable=True)

    def trained_parameters(self, name: str) -> list[nn.Parameter]:
        """The weights of a role that receive gradients: its adapter or its model, and its head."""
        role = self.roles[name]
        if not role.trainable:
            return []
        body: list[nn.Parameter] = []
        if role.body_of is None:
            model = self.models[role.model]
            body = self.adapters.parameters(role.adapter) if role.adapter else list(model.parameters())
        head = list(self.heads[name].parameters()) if name in self.heads else []
        return [*body, *head]

    def shard(self, sharding: Sharding) -> None:
        """Spread the models over ranks, once all roles are there. Adapters, and the heads beside them, stay whole."""
        for name, model in self.models.items():
            bank = self._adapters if name == BASE else None
            sharding.shard_model(model, bank.all_parameters() if bank else ())  # type: ignore[arg-type]
        if self.settings.mode == "full":
            for head in self.heads.values():
                sharding.shard_head(head)

    @contextmanager
    def play(self, name: str) -> Iterator[PreTrainedModel]:
        """Within it, the model computes as this role.

        Run `backward` inside it too: gradient checkpointing computes activations again with the adapter that is
        active at that time.
        """
        role = self.roles[name]
        with self.adapters.active(role.adapter) if role.model == BASE else nullcontext():
            yield self.model_of(name)

    def model_of(self, name: str) -> PreTrainedModel:
        """The model that a role computes with, perhaps among others; :meth:`play` makes it compute as this one."""
        return cast(PreTrainedModel, self.models[self.roles[name].model])

    def context_length(self, name: str) -> int:
        """Tokens that the model of a role takes, prompt and response together."""
        return context_length(self.model_of(name).config)

    def head(self, name: str) -> ScalarHead:
        """The scalar head of a role that has one."""
        head = self.heads[name]
        assert isinstance(head, ScalarHead)
        return head

    # Saving -----------------------------------------------------------------------------------------------------

    def save_role(self, name: str, folder: Path, card: RoleCard) -> None:
        """Write a role as a PEFT folder (adapter) or Hugging Face folder (model), with tokenizer and `role.json`.

        Every rank has to call it; the first one writes.

        Raises:
            UserError: if the folder exists and is not empty.
        """
        if any(gather_objects(rank() == 0 and folder.exists() and any(folder.iterdir()))):
            raise UserError(f"{folder} exists already; remove it or choose another folder.")
        role = self.roles[name]
        head = whole_weights(self.heads[name]) if name in self.heads else None
        weights = whole_weights(self.models[role.model]) if role.adapter is None else {}
        if rank() > 0:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if role.adapter is not None:
            self.adapters.save(role.adapter, folder, self.settings.revision)
        else:
            save_model(self.models[role.model], folder, weights, self.chat)  # type: ignore[arg-type]
        self.chat.tokenizer.save_pretrained(folder)
        if head is not None:
            save_file(head, folder / HEAD_FILE)
        card.write(folder)

    def card(self, name: str, role: str, settings: dict[str, Any]) -> RoleCard:
        """The card that says what a role of this backbone was trained on."""
        return RoleCard(
            role=role,
            kind="model" if self.roles[name].adapter is None else "adapter",
            base_model=self.settings.model,
            base_revision=self.settings.revision,
            base_fingerprint=self.fingerprint,
            vocabulary_fingerprint=self.chat.fingerprint,
            settings=settings,
        )

    # Inside -----------------------------------------------------------------------------------------------------

    def _add_on_base(self, name: str, trainable: bool) -> None:
        bank = self.adapters
        if trainable:
            bank.add(name, self.settings.lora, trainable=True)
        self.roles[name] = Role(name, BASE, name if trainable else None, trainable)

    def _load_model(self, source: str, dtype: torch.dtype, quantized: bool = False) -> PreTrainedModel:
        model = load_causal_lm(source, self.settings, dtype, quantized, self._device)
        check_tokenizer(model, source, self.chat)
        if (self._device is None or self._device.type == "cpu") and onednn_is_faster():
            use_onednn(model)
        return model

    def _add_head(self, name: str, folder: Path | None, trainable: bool) -> None:
        model = self.model_of(name)
        head = ScalarHead(model.config.get_text_config().hidden_size, self.settings.trained_dtype)
        if folder is not None:
            head.load(folder, name, needed=not trainable)
        if trainable and self.roles[name].adapter is None and self.roles[name].body_of is None:
            freeze_unused_output_layer(model)
        self.heads[name] = head.requires_grad_(trainable).to(model.device)

    def _add_model(self, name: str, source: str | None, trainable: bool) -> None:
        dtype = self.settings.trained_dtype if trainable else self.settings.frozen_dtype
        if source is not None:
            check_same_vocabulary(name, source, self.chat, self.settings)
        self.models[name] = self._load_model(source or self.settings.model, dtype).requires_grad_(trainable)
