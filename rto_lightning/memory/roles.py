"""Which roles a stage holds, as its module would add them to the backbone, but from settings alone.

A role whose folder is not there yet counts as what the settings say: an adapter of that shape, or a copy of the base.
"""

from pathlib import Path

from lightning.pytorch.cli import OptimizerCallable

from rto_lightning.backbone import BackboneSettings, LoraSettings
from rto_lightning.backbone.adapter_files import read_lora_config
from rto_lightning.backbone.model_files import ADAPTER_CONFIG
from rto_lightning.backbone.roles import role_folder
from rto_lightning.memory.workload import OutsideModel, RoleWeights
from rto_lightning.modules import PreferenceModule, RewardModelModule, RTOModule, StageModule
from rto_lightning.rewards import saved_reward_role


def roles_of(module: StageModule) -> tuple[RoleWeights, ...]:
    """The roles that a stage holds while it trains.

    Args:
        module: the stage, whose models need not be loaded.

    Raises:
        TypeError: if it is not a stage of this project.
    """
    if isinstance(module, RTOModule):
        return _roles_of_rto(module)
    settings, start = module.settings, module.trained or module.settings.init
    is_reward = isinstance(module, RewardModelModule)
    trained = _added(settings, module.trained_role, start, module.optimizer, head=is_reward)
    if isinstance(module, PreferenceModule):
        held = settings.mode == "adapters" or module.reference_cache is None
        if held and module.loss != "simpo":
            return _added(settings, "reference", settings.init), trained
    return (trained,)


def outside_models_of(module: StageModule) -> tuple[OutsideModel, ...]:
    """The reward models of a stage that share nothing with the base."""
    if not isinstance(module, RTOModule) or module.rewards.beta_3 == 0:
        return ()
    named = [source.reward for source in module.sources if source.reward is not None]
    return tuple(OutsideModel(source) for source in named if saved_reward_role(source) is None)


def copies_base_later(module: StageModule) -> bool:
    """Whether a stage of mode `full` loads the base once more, for a reference that only one phase reads."""
    if module.settings.mode == "adapters":
        return False
    if isinstance(module, RewardModelModule):
        return module.score_statistics.samples > 0
    return isinstance(module, PreferenceModule) and module.reference_cache is not None


def _roles_of_rto(module: RTOModule) -> tuple[RoleWeights, ...]:
    settings = module.settings
    reference = _added(settings, "reference", settings.init)
    policy = _added(settings, "policy", module.trained or settings.init, module.optimizer)
    roles = [reference, policy]
    if module.ema_decay is not None:
        roles.append(RoleWeights("policy_average", policy.kind, policy.lora, policy.source, master=True))
    if module.rewards.beta_1 != 0:
        assert module.dpo is not None
        roles.append(_added(settings, "dpo", module.dpo))
        if module.dpo_reference is not None:
            roles.append(_added(settings, "dpo_reference", module.dpo_reference))
    if module.rewards.beta_3 != 0:
        for number, source in enumerate(module.sources, start=1):
            if source.reward is not None and saved_reward_role(source.reward) is not None:
                name = "reward" if number == 1 else f"reward_{number}"
                roles.append(_added(settings, name, source.reward, head=True))
    if module.ppo.has_critic:
        roles.append(_critic(module, {role.name: role for role in roles}))
    return tuple(roles)


def _critic(module: RTOModule, others: dict[str, RoleWeights]) -> RoleWeights:
    settings, init, optimizer = module.settings, module.critic.init, module.critic_optimizer
    if module.critic.shared:
        return RoleWeights("critic", "shared", master=True, head=True, optimizer=optimizer)
    if init in ("reward", "policy"):
        return _copied(settings, others["reward" if init == "reward" else "reference"], "critic", optimizer)
    return _added(settings, "critic", init, optimizer, head=True)


def _added(
    settings: BackboneSettings,
    name: str,
    source: str | None,
    optimizer: OptimizerCallable | None = None,
    head: bool = False,
) -> RoleWeights:
    """What `PolicyBackbone.add_role` would make; a role with an optimizer is a trained one."""
    trained = optimizer is not None
    folder = role_folder(source, name) if source is not None else None
    lora = _saved_adapter(folder) if folder is not None else None
    is_model = folder is not None and (folder / "config.json").exists()
    if lora is None and folder is not None and not is_model and settings.mode == "adapters":
        lora = settings.lora  # it has not been trained yet
    if lora is not None:
        return RoleWeights(name, "adapter", lora, master=True, head=head, optimizer=optimizer)
    if source is not None or (trained and settings.mode == "full"):
        shape = source if is_model else None
        return RoleWeights(name, "model", source=shape, master=trained, head=head, optimizer=optimizer)
    if trained:
        return RoleWeights(name, "adapter", settings.lora, master=True, head=head, optimizer=optimizer)
    return RoleWeights(name, "base", head=head)


def _copied(settings: BackboneSettings, original: RoleWeights, name: str, optimizer: OptimizerCallable) -> RoleWeights:
    """What `PolicyBackbone.copy_role` would make of a role for training, with a head."""
    if original.kind == "adapter":
        return RoleWeights(name, "adapter", original.lora, master=True, head=True, optimizer=optimizer)
    if original.kind == "base" and settings.mode == "adapters":
        return RoleWeights(name, "adapter", settings.lora, master=True, head=True, optimizer=optimizer)
    return RoleWeights(name, "model", source=original.source, master=True, head=True, optimizer=optimizer)


def _saved_adapter(folder: Path) -> LoraSettings | None:
    """The shape of a saved adapter; None if the folder holds a model."""
    if not (folder / ADAPTER_CONFIG).exists():
        return None
    saved = read_lora_config(folder)
    targets = saved.target_modules or []
    return LoraSettings(rank=saved.r, target_modules=targets if isinstance(targets, str) else sorted(targets))
