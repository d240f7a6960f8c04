"""Gradients of policy and critic for one minibatch, accumulated over microbatches."""

from collections.abc import Callable

import torch
from torch import Tensor

from rto_lightning.algorithms import PolicyLossStatistics, aggregate, policy_loss, value_loss
from rto_lightning.backbone import PolicyBackbone
from rto_lightning.modules.experience import Experience
from rto_lightning.modules.rto_settings import PPOSettings

Backward = Callable[[Tensor], None]


def accumulate_policy_gradients(
    backbone: PolicyBackbone,
    experience: Experience,
    rows: Tensor,
    ppo: PPOSettings,
    temperature: float,
    backward: Backward,
) -> dict[str, Tensor]:
    """Backward of the clipped policy loss, less the entropy bonus, of the samples `rows`, (M,) int64; gives metrics."""
    total, statistics = torch.zeros((), device=rows.device), None
    denominator, with_entropy = _denominator(experience, rows, ppo), ppo.entropy_coefficient != 0
    for part in rows.split(ppo.microbatch_size):
        sequences, mask = experience.trajectory.sequences.rows(part), experience.mask[part]
        with backbone.play("policy"):
            logprobs, entropy = backbone.token_logprobs("policy", sequences, temperature, with_entropy)
            loss, of_part = policy_loss(
                logprobs,
                experience.logprobs[part],
                experience.advantages[part],
                mask,
                ppo.clip_range,
                ppo.aggregation,
                denominator,
                dual_clip=ppo.dual_clip,
            )
            if entropy is not None:
                mean_entropy = aggregate(entropy, mask, ppo.aggregation, denominator)
                loss = loss - ppo.entropy_coefficient * mean_entropy
            backward(loss)
        total += loss.detach()
        statistics = of_part if statistics is None else statistics + of_part
    assert isinstance(statistics, PolicyLossStatistics)
    return {
        "policy/loss": total,
        "policy/clip_fraction": statistics.clipped / statistics.tokens,
        "policy/approximate_kl": statistics.approximate_kl / statistics.tokens,
        "policy/ratio_deviation": statistics.ratio_deviation,
    }


def accumulate_value_gradients(
    backbone: PolicyBackbone, experience: Experience, rows: Tensor, ppo: PPOSettings, backward: Backward
) -> dict[str, Tensor]:
    """Backward of the value loss of the samples `rows`, (M,) int64; returns metrics of the minibatch."""
    assert experience.values is not None
    total, clipped = torch.zeros((), device=rows.device), torch.zeros((), device=rows.device)
    denominator = _denominator(experience, rows, ppo)
    for part in rows.split(ppo.microbatch_size):
        with backbone.play("critic"):
            loss, clipped_part = value_loss(
                backbone.token_values("critic", experience.trajectory.sequences.rows(part)),
                experience.values[part],
                experience.returns[part],
                experience.mask[part],
                ppo.value_clip_range,
                ppo.aggregation,
                denominator,
            )
            backward(loss)
        total += loss.detach()
        clipped += clipped_part
    return {"value/loss": total, "value/clip_fraction": clipped / experience.mask[rows].sum()}


def _denominator(experience: Experience, rows: Tensor, ppo: PPOSettings) -> Tensor | float:
    """What the whole minibatch is divided by, so that microbatches add up to it."""
    return len(rows) if ppo.aggregation == "sequence" else experience.mask[rows].sum()
