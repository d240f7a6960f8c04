"""A role of a saved run, alone on a backbone of its own: whole, not quantized, on the CPU."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from rto_lightning.backbone import BackboneSettings, ChatTokenizer, PolicyBackbone, RoleCard, load_chat_tokenizer
from rto_lightning.backbone.chat import PLAIN
from rto_lightning.backbone.heads import HEAD_FILE
from rto_lightning.backbone.loading import load_config, load_tokenizer
from rto_lightning.backbone.roles import looks_like_hub_name
from rto_lightning.errors import UserError
from rto_lightning.modules import RTOModule, StageModule
from rto_lightning.saved.checkpoints import StoredWeights
from rto_lightning.saved.source import Checkpoint, SavedRole

AVERAGE = "policy_average"


class OpenedRole:
    """A role that can be read and written.

    Args:
        backbone: holds this role only.
        name: of the role on the backbone.
        card: what `role.json` says of it.
        step: of the checkpoint that it comes from; None for a saved role.
    """

    def __init__(self, backbone: PolicyBackbone, name: str, card: RoleCard, step: int | None = None) -> None:
        self.backbone = backbone
        self.name = name
        self.card = card
        self.step = step
        self.settings: BackboneSettings = backbone.settings
        """By which it was loaded."""
        self.chat: ChatTokenizer = backbone.chat
        """The tokenizer that it was trained with."""
        self.is_adapter = backbone.roles[name].adapter is not None
        """Whether it is an adapter on a base model."""
        self.head: dict[str, Tensor] | None = None
        """`weight` (1, H) and `bias` (1,) of its scalar head, if it has one."""
        if name in backbone.heads:
            self.head = {key: value.detach().clone() for key, value in backbone.head(name).state_dict().items()}

    @property
    def model(self) -> PreTrainedModel:
        """The model on which it is played, with its adapter, if it is one, inside."""
        return self.backbone.model_of(self.name)

    def release(self) -> None:
        """Give up the backbone, and the memory of its weights, of which another model may need so much."""
        release_weights(self.backbone)
        del self.backbone


def release_weights(module: nn.Module) -> None:
    """Free the weights of a module, which reference cycles may keep alive for long."""
    module.to("meta")


def open_role(
    source: SavedRole | Checkpoint,
    exact: bool,
    base_model: str | None,
    load_module: Callable[[Path], StageModule],
    trust_remote_code: bool = False,
) -> OpenedRole:
    """Load a role.

    Args:
        source: where it is.
        exact: hold frozen weights in float32, in which the role is compared; else in the data type of their files, in
            which they take less memory.
        base_model: where the base model of an adapter is now; None is where it was in training.
        load_module: builds the stage of a `config.yaml`.
        trust_remote_code: run code that the base model brings along; what the settings of its run say does not count.

    Raises:
        UserError: if it or its base model cannot be loaded.
    """
    if isinstance(source, SavedRole):
        return _open_saved(source, exact, base_model, trust_remote_code)
    module = load_module(source.config)
    module.settings = replace(module.settings, trust_remote_code=trust_remote_code)
    return _open_checkpoint(source, exact, base_model, module)


def _open_saved(source: SavedRole, exact: bool, base_model: str | None, trust_remote_code: bool) -> OpenedRole:
    card = source.card
    of_adapter = card.kind == "adapter"
    template = load_tokenizer(str(source.folder), None, trust_remote_code).chat_template
    settings = BackboneSettings(
        model=card.base_model if of_adapter else str(source.folder),
        revision=card.base_revision if of_adapter else None,
        mode="adapters" if of_adapter else "full",
        chat_template=template if isinstance(template, str) else PLAIN if template is None else None,
        trust_remote_code=trust_remote_code,
    )
    settings = _for_reading(settings, exact, base_model if of_adapter else None)
    backbone = PolicyBackbone(settings, load_chat_tokenizer(settings))
    backbone.add_role(card.role, str(source.folder), scalar_head=(source.folder / HEAD_FILE).exists())
    return OpenedRole(backbone, card.role, replace(card, **_base_of(settings)) if of_adapter else card)


def _open_checkpoint(source: Checkpoint, exact: bool, base_model: str | None, module: StageModule) -> OpenedRole:
    settings = _for_reading(module.settings, exact, base_model)
    stored = StoredWeights(source.path)
    # What it started from gives it its shape; its weights come from the checkpoint.
    name, start, scalar_head = module.trained_role, module.trained or module.settings.init, False
    if source.critic:
        name, start, scalar_head = "critic", _start_of_critic(module), True
    elif module.saved_as == "reward":
        scalar_head = True
    elif any(f".{AVERAGE}." in weight for weight in stored.shapes):
        name = AVERAGE
    chat = load_chat_tokenizer(settings)
    backbone = module.backbone = PolicyBackbone(settings, chat)
    backbone.add_role(name, start, trainable=True, scalar_head=scalar_head)
    trained = {id(weight) for weight in backbone.trained_parameters(name)}
    targets: dict[str, Tensor] = {key: weight for key, weight in module.named_parameters() if id(weight) in trained}
    targets |= {key: value for key, value in module.named_buffers() if key in stored.shapes}
    stored.read_into(targets)
    backbone.requires_grad_(False)
    card = backbone.card("critic", "critic", {}) if source.critic else module.role_card()
    return OpenedRole(backbone, name, card, stored.step)


def _start_of_critic(module: StageModule) -> str | None:
    """The role that a critic started from; None for the base model.

    Raises:
        UserError: if there is no critic with weights of its own.
    """
    if not isinstance(module, RTOModule) or not module.ppo.has_critic:
        raise UserError("this stage trained no critic; leave --role out to export the role that it trains.")
    if module.critic.shared:
        raise UserError(
            "the critic of this stage is a head on the policy's hidden states and no role of its own; leave --role out "
            "to export the policy."
        )
    if module.critic.init == "reward":
        return module.sources[0].reward
    return module.settings.init if module.critic.init == "policy" else module.critic.init


def _for_reading(settings: BackboneSettings, exact: bool, base_model: str | None) -> BackboneSettings:
    """As in training, but for what only a GPU can do, and whole."""
    changes: dict[str, Any] = {"quantization": None, "attention": "sdpa", "gradient_checkpointing": False}
    if base_model not in (None, settings.model):
        changes |= {"model": base_model, "revision": None}
    settings = replace(settings, **changes)
    if not Path(settings.model).exists() and not looks_like_hub_name(settings.model):
        raise UserError(f"the base model {settings.model} does not exist; say where it is now by --base_model.")
    return replace(settings, dtype="float32" if exact else _stored_dtype(settings))


def _stored_dtype(settings: BackboneSettings) -> Literal["float32", "bfloat16"]:
    """What holds the weights of the files as they are."""
    config = load_config(settings.model, settings.revision, settings.trust_remote_code)
    return "bfloat16" if str(config.dtype).removeprefix("torch.") == "bfloat16" else "float32"


def _base_of(settings: BackboneSettings) -> dict[str, Any]:
    return {"base_model": settings.model, "base_revision": settings.revision}
