"""The update of one PPO iteration: minibatches of policy loss and, with a critic, value loss."""

from collections.abc import Callable, Mapping, Sequence

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from rto_lightning.backbone import PolicyBackbone
from rto_lightning.modules.experience import Experience
from rto_lightning.modules.ppo_gradients import Backward, accumulate_policy_gradients, accumulate_value_gradients
from rto_lightning.modules.rto_settings import PPOSettings
from rto_lightning.parallel import clip_gradients, sum_gradients
from rto_lightning.seeding import derive_seed

Passes = Callable[[str, Tensor, Mapping[str, Tensor], Tensor], bool]
"""Whether a step may be taken, from its role, the rows of its minibatch, the metrics with its losses, and the norm of
its gradient."""


def minibatches(samples: int, ppo: PPOSettings, seed: int, iteration: int) -> list[Tensor]:
    """Rows of each minibatch of an iteration, (M,) int64 on the CPU: each epoch has all samples in an order of its own.

    Args:
        samples: of the iteration, over all ranks.
        ppo: epochs and the size of a minibatch.
        seed: of the run.
        iteration: enters the seed of the order.
    """
    parts: list[Tensor] = []
    for epoch in range(ppo.epochs):
        generator = torch.Generator().manual_seed(derive_seed(seed, "minibatches", iteration, epoch))
        parts += torch.randperm(samples, generator=generator).split(ppo.minibatch_size or samples)
    return parts


def ppo_update(
    backbone: PolicyBackbone,
    experience: Experience,
    parts: Sequence[Tensor],
    ppo: PPOSettings,
    temperature: float,
    backward: Backward,
    policy: LightningOptimizer | None,
    critic: LightningOptimizer | None,
    passes: Passes,
    value_coefficient: float | None = None,
) -> dict[str, Tensor]:
    """Train policy and critic on each minibatch in turn.

    Lightning's wrapper of an optimizer counts `global_step`: of all optimizer steps exactly one goes through it, and so
    a training step counts as one iteration.

    Args:
        backbone: the model and its roles.
        experience: B samples.
        parts: rows of each minibatch, (M,) int64, in the order of training; see :func:`minibatches`. Without any
            nothing is trained, and the iteration counts.
        ppo: losses, and when to stop.
        temperature: of the policy that sampled.
        backward: runs the backward pass of a loss.
        policy: optimizer of the policy; None leaves the policy as it is.
        critic: optimizer of the critic; None where there is none.
        passes: asked before each step, of which it may have one left out.
        value_coefficient: what the value loss counts in the weights of a policy whose hidden states the critic reads;
            None where the critic has weights of its own.

    Returns:
        For each metric its mean over the minibatches that have it, detached scalars.
    """
    counting = policy if critic is None else critic
    assert counting is not None
    if not parts:
        counting.step()
        return {}
    history: list[dict[str, Tensor]] = []
    policy_steps, stopped = 0, policy is None
    for number, rows in enumerate(parts):
        rows, last = rows.to(experience.mask.device), number == len(parts) - 1
        metrics: dict[str, Tensor] = {}
        if policy is not None and not stopped:
            metrics |= accumulate_policy_gradients(
                backbone, experience, rows, ppo, temperature, backward, value_coefficient
            )
            stopped = ppo.kl_stop is not None and float(metrics["policy/approximate_kl"]) > ppo.kl_stop
            if stopped:
                policy.zero_grad(set_to_none=True)
            else:
                norm = _gradient_norm(backbone, "policy", ppo.policy_gradient_clip_val)
                taken = passes("policy", rows, metrics, norm)
                _step(policy, taken, counted=last and critic is None)
                metrics["policy/gradient_norm"] = norm
                policy_steps += taken
        if critic is not None:
            if "critic/loss" not in metrics:
                metrics |= accumulate_value_gradients(
                    backbone, experience, rows, ppo, backward, head_only=value_coefficient is not None
                )
            norm = _gradient_norm(backbone, "critic", ppo.critic_gradient_clip_val)
            _step(critic, passes("critic", rows, {"critic/loss": metrics["critic/loss"]}, norm), counted=last)
            metrics["critic/gradient_norm"] = norm
        history.append(metrics)
    if stopped and critic is None:
        counting.step()  # without gradients it moves nothing
    names = dict.fromkeys(name for metrics in history for name in metrics)
    result = {name: torch.stack([m[name].float() for m in history if name in m]).mean() for name in names}
    if policy is not None:
        result["policy/ratio_deviation_first"] = history[0]["policy/ratio_deviation"]
        result["policy/optimizer_steps"] = torch.tensor(float(policy_steps))
    return result


def _gradient_norm(backbone: PolicyBackbone, role: str, clip: float | None) -> Tensor:
    """The norm of a role's gradient over all ranks, before it is clipped."""
    weights = backbone.trained_parameters(role)
    sum_gradients(weights)
    return clip_gradients(weights, clip)


def _step(optimizer: LightningOptimizer, taken: bool, counted: bool) -> None:
    if not taken:
        optimizer.zero_grad(set_to_none=True)  # without gradients a step moves nothing
    (optimizer if counted else optimizer.optimizer).step()
    optimizer.zero_grad(set_to_none=True)
