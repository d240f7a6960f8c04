"""Settings of the RTO stage. Defaults are the values of the paper (arXiv 2404.18922) where it gives one."""

from dataclasses import dataclass
from typing import Literal

from rto_lightning.errors import UserError, check_settings


@dataclass
class RewardSettings:
    """The reward of every token: r_t = beta_1 * log(dpo / reference) - beta_2 * KL + [t = last] * beta_3 * score."""

    beta_1: float = 0.05
    """Scale of the token rewards; 0 is plain PPO, and no DPO role is loaded."""
    beta_2: float = 0.01
    """Coefficient of the KL penalty; the starting value if `kl_target` is set."""
    beta_3: float = 1.0
    """Scale of the sentence-level score; 0 needs no reward model."""
    token_reward_clip: float = 0.05
    """Largest magnitude of a token reward, after scaling by beta_1; 0 is off."""
    score_clip: float = 10.0
    """Largest magnitude of a score, after normalisation; 0 is off."""
    normalize_score: bool = True
    """Subtract the mean score of the reference policy's answers and divide by their standard deviation."""
    normalization_samples: int = 256
    """Answers to measure those on when the reward role does not bring them along."""
    truncation_penalty: float = 0.0
    """Subtracted from the score of a response that hit the length limit."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL divergence in the reward."""
    kl_target: float | None = None
    """KL per response, in nats, that an adaptive coefficient aims at (arXiv 1909.08593); null keeps beta_2 fixed."""
    kl_horizon: int = 10000
    """Samples over which the adaptive coefficient reacts."""

    def __post_init__(self) -> None:
        """Raise UserError for values that no run can use."""
        check_settings(
            "model.rewards",
            self,
            positive=("kl_target", "kl_horizon", "normalization_samples"),
            not_negative=("token_reward_clip", "score_clip", "truncation_penalty"),
        )


@dataclass
class PPOSettings:
    """One PPO iteration: advantages, then `epochs` passes over the rollout in minibatches."""

    epochs: int = 1
    """Passes over the samples of an iteration."""
    minibatch_size: int | None = None
    """Samples for each optimizer step; null takes all samples of the iteration."""
    microbatch_size: int = 8
    """Samples for each forward and backward; changes memory, not the result."""
    scoring_batch_size: int | None = None
    """Samples for each forward while scoring; null takes twice `microbatch_size`."""
    gamma: float = 1.0
    """Discount of rewards, per token."""
    lam: float = 0.95
    """Lambda of generalised advantage estimation (arXiv 1506.02438)."""
    whiten_advantages: bool = True
    """Bring advantages to mean 0 and variance 1 over the iteration."""
    clip_range: float = 0.2
    """The policy ratio counts up to 1 +- this."""
    value_clip_range: float | None = 0.2
    """New values count up to old values +- this; null is off."""
    aggregation: Literal["sequence", "token"] = "sequence"
    """Mean over each response's tokens and then over responses, or over all tokens."""
    policy_gradient_clip_val: float | None = 1.0
    """Largest gradient norm of the policy; null is off."""
    critic_gradient_clip_val: float | None = 1.0
    """Largest gradient norm of the critic; null is off."""

    def __post_init__(self) -> None:
        """Raise UserError for values that no run can use."""
        positive = ("epochs", "minibatch_size", "microbatch_size", "scoring_batch_size", "clip_range")
        clips = ("value_clip_range", "policy_gradient_clip_val", "critic_gradient_clip_val")
        check_settings("model.ppo", self, positive=positive + clips)

    def check(self, samples: int) -> None:
        """Raise UserError if `samples` of one iteration do not split into the minibatches."""
        size = self.minibatch_size or samples
        if samples % size:
            raise UserError(
                f"ppo.minibatch_size {size} does not divide the {samples} prompts of an iteration (data.batch_size); "
                "set one to a divisor of the other."
            )


@dataclass
class CriticSettings:
    """Where the critic starts."""

    init: str = "reward"
    """`reward` (the reward role, head rescaled to normalised units), `policy` (the policy's start with a head of
    zeros), or the folder of a saved role."""
    warmup_iterations: int = 0
    """First iterations in which the critic alone is trained."""
