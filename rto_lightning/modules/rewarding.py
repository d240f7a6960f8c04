"""From a trajectory to the reward of every token: the roles read it, one after another."""

import torch
from torch import Tensor

from rto_lightning.algorithms import compose_rewards, kl_estimate, truncated_importance_weights
from rto_lightning.backbone import Message, sentence_ends
from rto_lightning.modules.experience import PolicyReading, RewardedTrajectory
from rto_lightning.modules.reading import TrajectoryReader
from rto_lightning.modules.rto_settings import RewardSettings
from rto_lightning.rewards import WeightedScores
from rto_lightning.rollout import Trajectory


def reward_trajectory(
    reader: TrajectoryReader,
    trajectory: Trajectory,
    policy: PolicyReading,
    prompts: list[list[Message]],
    temperature: float,
    rewards: RewardSettings,
    kl_coefficient: float,
    scores: WeightedScores | None,
) -> RewardedTrajectory:
    """Read the trajectory as every role but policy and critic and compose the reward of every token.

    Args:
        reader: reads the roles; `dpo_reference` is the reference unless it is among them.
        trajectory: B prompts with a response each.
        policy: what the policy says of it.
        prompts: the messages of the prompts, for reward sources that read text.
        temperature: of policy and KL reference.
        rewards: the terms of the reward.
        kl_coefficient: beta_2 at this iteration.
        scores: the sentence-level score; None without one.
    """
    mask, backbone = trajectory.sequences.response_mask, reader.backbone
    reference = reader.logprobs("reference", trajectory, temperature)
    dpo: Tensor | None = None
    dpo_reference: Tensor | None = None
    ends: Tensor | None = None
    if rewards.beta_1 != 0:
        # DPO and its reference are read at temperature 1, where DPO was trained.
        # The clip of token rewards would hide an infinite one, but not NaN.
        dpo = _infinity_as_nan(reader.logprobs("dpo", trajectory))
        if "dpo_reference" in backbone.roles:
            dpo_reference = _infinity_as_nan(reader.logprobs("dpo_reference", trajectory))
        elif temperature != 1.0:
            dpo_reference = reader.logprobs("reference", trajectory)
        if rewards.granularity == "sentence":
            ends = sentence_ends(backbone.chat.tokenizer, trajectory.sequences.response_ids, mask)
    of_sources = reader.scores(scores, trajectory, prompts) if scores is not None else None
    terms = compose_rewards(
        policy.logprobs,
        reference,
        dpo,
        dpo_reference,
        scores.combine(of_sources) if scores is not None and of_sources is not None else None,
        mask,
        beta_1=rewards.beta_1,
        beta_2=kl_coefficient,
        beta_3=rewards.beta_3,
        token_reward_clip=rewards.token_reward_clip,
        score_clip=rewards.score_clip,
        kl_estimator=rewards.kl_estimator,
        truncated=trajectory.truncated,
        truncation_penalty=rewards.truncation_penalty,
        granularity=rewards.granularity,
        sentence_ends=ends,
        min_response_tokens=rewards.min_response_tokens,
        short_penalty=rewards.short_penalty,
    )
    kl = kl_estimate(policy.logprobs, reference, mask, "k1")
    return RewardedTrajectory(trajectory, policy.logprobs, policy.entropy, kl, of_sources, terms)


def _infinity_as_nan(logprobs: Tensor) -> Tensor:
    return logprobs.where(logprobs.isfinite(), torch.nan)


def weigh_for_engine(advantages: Tensor, rewarded: RewardedTrajectory, cap: float | None) -> Tensor:
    """Advantages (B, T) times :func:`truncated_importance_weights`, for what another engine sampled; None is 1."""
    of_engine = rewarded.trajectory.engine_logprobs
    if cap is None or of_engine is None:
        return advantages
    return advantages * truncated_importance_weights(rewarded.logprobs, of_engine, rewarded.mask, cap)
