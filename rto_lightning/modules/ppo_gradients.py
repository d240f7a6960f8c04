"""Gradients of policy and critic for one minibatch, accumulated over microbatches.

Losses are divided by the counts of the whole minibatch, of which each rank reads a share: added up over ranks,
gradients and metrics are those of one process.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rto_lightning.algorithms import PolicyLossStatistics, aggregate, policy_loss, value_loss
from rto_lightning.backbone import PolicyBackbone
from rto_lightning.modules.experience import Experience
from rto_lightning.modules.gathering import own_rows
from rto_lightning.modules.reading import by_length
from rto_lightning.modules.rto_settings import PPOSettings
from rto_lightning.parallel import largest_over_ranks, sum_over_ranks

Backward = Callable[[Tensor], None]


def accumulate_policy_gradients(
    backbone: PolicyBackbone,
    experience: Experience,
    rows: Tensor,
    ppo: PPOSettings,
    temperature: float,
    backward: Backward,
    value_coefficient: float | None = None,
) -> dict[str, Tensor]:
    """Backward of the policy loss of a minibatch, with the value loss of a critic that shares the policy's weights.

        loss = policy loss - entropy_coefficient * entropy + value loss

    of whose last term the shared weights receive `value_coefficient` times the gradient, and the critic's head all.

    Args:
        backbone: the model and its roles.
        experience: B samples.
        rows: those of the minibatch on all ranks, (M,) int64.
        ppo: losses and microbatches.
        temperature: of the policy that sampled.
        backward: runs the backward pass of a loss.
        value_coefficient: what the value loss counts in the shared weights; None where the critic has its own.

    Returns:
        Metrics of the minibatch.
    """
    value_metrics, statistics = _ValueMetrics(rows.device), None
    total = torch.zeros((), device=rows.device)
    denominator, with_entropy = _denominator(experience, rows, ppo), ppo.entropy_coefficient != 0
    for part in _own_rows(experience, rows).split(ppo.microbatch_size):
        sequences, mask = experience.trajectory.sequences.rows(part), experience.mask[part]
        with backbone.play("policy"):
            values: Tensor | None = None
            if value_coefficient is None:
                logprobs, entropy = backbone.token_logprobs("policy", sequences, temperature, with_entropy)
            else:
                logprobs, entropy, values = backbone.token_logprobs_and_values(
                    "policy", "critic", sequences, temperature, with_entropy, value_coefficient
                )
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
            total += loss.detach()
            if entropy is not None:
                mean_entropy = aggregate(entropy, mask, ppo.aggregation, denominator)
                loss = loss - ppo.entropy_coefficient * mean_entropy
                total -= ppo.entropy_coefficient * mean_entropy.detach()
            if values is not None:
                loss = loss + value_metrics.add(*_value_loss(values, experience, part, ppo, denominator))
            backward(loss)
        statistics = of_part if statistics is None else statistics + of_part
    assert isinstance(statistics, PolicyLossStatistics)
    statistics = _over_ranks(statistics)
    metrics = {
        "policy/loss": sum_over_ranks(total),
        "policy/clip_fraction": statistics.clipped / statistics.tokens,
        "policy/approximate_kl": statistics.approximate_kl / statistics.tokens,
        "policy/ratio_deviation": statistics.ratio_deviation,
    }
    return metrics if value_coefficient is None else metrics | value_metrics.result(experience.mask[rows].sum())


def accumulate_value_gradients(
    backbone: PolicyBackbone,
    experience: Experience,
    rows: Tensor,
    ppo: PPOSettings,
    backward: Backward,
    head_only: bool = False,
) -> dict[str, Tensor]:
    """Backward of the value loss of the samples `rows`, (M,) int64; returns metrics of the minibatch.

    With `head_only` no gradient goes beyond the head: the weights below belong to the policy.
    """
    metrics, denominator = _ValueMetrics(rows.device), _denominator(experience, rows, ppo)
    for part in _own_rows(experience, rows).split(ppo.microbatch_size):
        with backbone.play("critic"):
            sequences = experience.trajectory.sequences.rows(part)
            values = backbone.token_values("critic", sequences, head_only)
            backward(metrics.add(*_value_loss(values, experience, part, ppo, denominator)))
    return metrics.result(experience.mask[rows].sum())


class _ValueMetrics:
    """Sums over microbatches."""

    def __init__(self, device: torch.device) -> None:
        self.loss, self.clipped = torch.zeros((), device=device), torch.zeros((), device=device)

    def add(self, loss: Tensor, clipped: Tensor) -> Tensor:
        """Count a microbatch; returns its loss."""
        self.loss += loss.detach()
        self.clipped += clipped
        return loss

    def result(self, tokens: Tensor) -> dict[str, Tensor]:
        """Metrics of a minibatch with that many response tokens on all ranks."""
        return {
            "critic/loss": sum_over_ranks(self.loss),
            "critic/clip_fraction": sum_over_ranks(self.clipped) / tokens,
        }


def _value_loss(
    values: Tensor, experience: Experience, rows: Tensor, ppo: PPOSettings, denominator: Tensor | float
) -> tuple[Tensor, Tensor]:
    assert experience.values is not None
    return value_loss(
        values,
        experience.values[rows],
        experience.returns[rows],
        experience.mask[rows],
        ppo.value_clip_range,
        ppo.aggregation,
        denominator,
    )


def _own_rows(experience: Experience, rows: Tensor) -> Tensor:
    """Those of a minibatch that this rank trains on, longest first; each rank gets like lengths."""
    return own_rows(by_length(experience.trajectory.sequences, rows))


def _over_ranks(statistics: PolicyLossStatistics) -> PolicyLossStatistics:
    return PolicyLossStatistics(
        clipped=sum_over_ranks(statistics.clipped),
        approximate_kl=sum_over_ranks(statistics.approximate_kl),
        ratio_deviation=largest_over_ranks(statistics.ratio_deviation),
        tokens=sum_over_ranks(statistics.tokens),
    )


def _denominator(experience: Experience, rows: Tensor, ppo: PPOSettings) -> Tensor | float:
    """What the whole minibatch is divided by, so that microbatches add up to it."""
    return len(rows) if ppo.aggregation == "sequence" else experience.mask[rows].sum()
