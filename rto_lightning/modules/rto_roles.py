"""The roles of the RTO stage beside policy and reference: dpo, critic, and the policy's moving average."""

import torch

from rto_lightning.backbone import PolicyBackbone
from rto_lightning.errors import UserError
from rto_lightning.rewards import ScoreNormalizer


def add_dpo(backbone: PolicyBackbone, dpo: str, dpo_reference: str | None, init_fingerprint: str | None) -> None:
    """Add the role that carries the token rewards, and its own reference if one is named.

    Args:
        backbone: where they are added.
        dpo: saved role or model.
        dpo_reference: what it was trained against; None is the run's reference.
        init_fingerprint: tells what the run's reference is; see :attr:`StageModule.init_fingerprint`.

    Raises:
        UserError: if the role was trained against another reference than the run's, and that one is not named.
    """
    backbone.add_role("dpo", dpo)
    if dpo_reference is not None:
        backbone.add_role("dpo_reference", dpo_reference)
        return
    card = backbone.cards.get("dpo")
    if card is not None and card.kind == "adapter" and card.init_fingerprint != init_fingerprint:
        raise UserError(
            f"the dpo role {dpo} was trained against another reference than this run's; set "
            "model.backbone.init as in its DPO run, or name that reference as model.dpo_reference."
        )


def add_critic(backbone: PolicyBackbone, init: str) -> None:
    """Add the critic, which starts as `init` says; see :class:`CriticSettings`."""
    if init == "reward":
        backbone.copy_role("reward", "critic", trainable=True, scalar_head=True)
    elif init == "policy":
        backbone.copy_role("reference", "critic", trainable=True, scalar_head=True)
    else:
        backbone.add_role("critic", init, trainable=True, scalar_head=True)


def scale_critic(backbone: PolicyBackbone, init: str, normalizer: ScoreNormalizer) -> None:
    """Bring a critic that starts as a reward role to units of the normalised score."""
    card = backbone.cards.get("critic")
    from_reward = init == "reward" or (card is not None and card.role == "reward")
    if "critic" in backbone.roles and from_reward and normalizer.enabled:
        backbone.head("critic").rescale(*normalizer.mean_std.tolist())


def add_policy_average(backbone: PolicyBackbone) -> None:
    """Add the moving average, which starts as the policy; no optimizer trains it."""
    backbone.copy_role("policy", "policy_average", trainable=True)  # held in the precision of trained weights
    for weight in backbone.trained_parameters("policy_average"):
        weight.requires_grad_(False)


@torch.no_grad()
def average_policy(backbone: PolicyBackbone, decay: float) -> None:
    """average <- decay * average + (1 - decay) * policy"""
    pairs = zip(backbone.trained_parameters("policy_average"), backbone.trained_parameters("policy"), strict=True)
    for average, weight in pairs:
        average.lerp_(weight, 1 - decay)
