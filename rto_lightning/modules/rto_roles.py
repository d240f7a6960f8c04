"""The roles of the RTO stage beside policy and reference: dpo, critic, and the policy's moving average."""

from collections.abc import Sequence

import torch

from rto_lightning.backbone import PolicyBackbone
from rto_lightning.errors import UserError
from rto_lightning.modules.rto_settings import CriticSettings
from rto_lightning.rewards import WeightedScores


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
    if card is None:  # of others, who say nothing of its reference
        return
    if card.init_fingerprint != init_fingerprint or card.base_fingerprint != backbone.fingerprint:
        raise UserError(
            f"the dpo role {dpo} was trained against another reference than this run's; set "
            "model.backbone.init as in its DPO run, or name that reference as model.dpo_reference."
        )


def add_critic(backbone: PolicyBackbone, critic: CriticSettings) -> None:
    """Add the critic, which is and starts as the settings say."""
    init = critic.init
    if critic.shared:
        backbone.share_role("policy", "critic")
    elif init == "reward":
        backbone.copy_role("reward", "critic", trainable=True, scalar_head=True)
    elif init == "policy":
        backbone.copy_role("reference", "critic", trainable=True, scalar_head=True)
    else:
        backbone.add_role("critic", init, trainable=True, scalar_head=True)


def scale_critic(backbone: PolicyBackbone, critic: CriticSettings, scores: WeightedScores, beta_3: float) -> None:
    """Bring a critic that starts as a reward role to units of the reward, beta_3 * weight * (score - mean) / std.

    Mean and deviation are those of the role that it starts as; where they are not known (yet), nothing happens.
    """
    statistics: Sequence[float | None]
    if critic.shared:
        return
    if critic.init == "reward":
        if not scores.normalizer().ready:
            return
        statistics, weight = scores.normalizer().mean_std.tolist(), scores.weights[0]
    elif "critic" in backbone.cards and backbone.cards["critic"].role == "reward":
        statistics, weight = (backbone.cards["critic"].score_mean, backbone.cards["critic"].score_std), 1.0
    else:
        return
    mean, std = statistics if scores.normalizer().enabled else (0.0, 1.0)
    if mean is not None and std is not None and beta_3 * weight != 0:
        backbone.head("critic").rescale(mean, std / (beta_3 * weight))


def add_policy_average(backbone: PolicyBackbone) -> None:
    """Add the moving average, which starts as the policy. Its weights change, but no gradient reaches them."""
    backbone.copy_role("policy", "policy_average", trainable=True)
    for weight in backbone.trained_parameters("policy_average"):
        weight.requires_grad_(False)


@torch.no_grad()
def average_policy(backbone: PolicyBackbone, decay: float) -> None:
    """average <- decay * average + (1 - decay) * policy"""
    pairs = zip(backbone.trained_parameters("policy_average"), backbone.trained_parameters("policy"), strict=True)
    for average, weight in pairs:
        average.lerp_(weight, 1 - decay)
