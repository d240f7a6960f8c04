"""Settings of the RTO stage. Defaults are the values of the paper (arXiv 2404.18922) where it gives one."""

from dataclasses import dataclass
from typing import Literal

from rto_lightning.algorithms import GROUP_ESTIMATORS, WHITENED_ESTIMATORS, Estimator, Granularity
from rto_lightning.errors import UserError, check_settings


@dataclass(frozen=True)
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
    granularity: Granularity = "token"
    """Where token rewards are put after clipping: `token` leaves them (RTO); `sentence` moves each sentence's sum to
    its end (Semi-RTO); `delayed` moves the whole sum to the last token (DDPO); `shaping` takes the sum off again at
    the last token, so that a response earns its score alone (RS-PPO)."""
    score_clip: float = 10.0
    """Largest magnitude of the score, after normalisation and, of several sources, addition; 0 is off."""
    normalize_score: bool = True
    """Subtract the mean score of the reference policy's answers and divide by their standard deviation."""
    normalization_samples: int = 256
    """Answers to measure those on when the reward role does not bring them along."""
    truncation_penalty: float = 0.0
    """Subtracted from the score of a response that hit the length limit."""
    min_response_tokens: int = 0
    """Responses with fewer tokens, the stop id included, pay `short_penalty`; 0 is off."""
    short_penalty: float = 0.0
    """Subtracted from the score of a response that is too short."""
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
            not_negative=(
                "beta_2",
                "token_reward_clip",
                "score_clip",
                "truncation_penalty",
                "min_response_tokens",
                "short_penalty",
            ),
        )
        if self.kl_target is not None and self.beta_2 == 0:
            raise UserError("model.rewards.kl_target multiplies beta_2, which is 0; set beta_2 above 0.")
        if (self.short_penalty == 0) != (self.min_response_tokens == 0):
            raise UserError(
                "model.rewards.short_penalty and min_response_tokens do nothing without each other; set both or none."
            )

    def check(self, samples: int) -> None:
        """Raise UserError if an iteration of `samples` responses could move the KL coefficient to 0 or below."""
        if self.kl_target is not None and samples >= 5 * self.kl_horizon:
            raise UserError(
                f"rewards.kl_horizon {self.kl_horizon} is too short for the {samples} responses of an iteration; set "
                "it to more than a fifth of them."
            )


@dataclass(frozen=True)
class PPOSettings:
    """One PPO iteration: advantages, then `epochs` passes over the rollout in minibatches."""

    epochs: int = 1
    """Passes over the samples of an iteration."""
    minibatch_size: int | None = None
    """Samples for each optimizer step, over all devices; null takes all samples of the iteration."""
    microbatch_size: int = 8
    """Samples for each forward and backward; changes memory, not the result."""
    scoring_batch_size: int | None = None
    """Samples for each forward while scoring; null takes twice `microbatch_size`."""
    gamma: float = 1.0
    """Discount of rewards, per token."""
    lam: float = 0.95
    """Lambda of generalised advantage estimation (arXiv 1506.02438)."""
    estimator: Estimator = "gae"
    """How rewards become advantages: `gae` with a critic; without one `reinforce++` (arXiv 2501.03262), `rloo`
    (arXiv 2402.14740) or `grpo` (arXiv 2402.03300), the last two with several `rollout.responses_per_prompt`. Settings
    of critic and values, and `lam`, are then not read."""
    whiten_advantages: bool | None = None
    """Bring advantages to mean 0 and variance 1 over the iteration; null does so for `gae` and `reinforce++`."""
    clip_range: float = 0.2
    """The policy ratio counts up to 1 +- this."""
    dual_clip: float | None = None
    """Largest ratio, above 1 + clip_range, by which a negative advantage counts (arXiv 1912.09729); null is off."""
    entropy_coefficient: float = 0.0
    """Entropy bonus: this times the policy's mean entropy, in nats, is subtracted from its loss."""
    kl_stop: float | None = None
    """KL from the policy that sampled, in nats a token and estimated on each minibatch, beyond which the policy is not
    trained further in this iteration; null is off."""
    value_clip_range: float | None = 0.2
    """New values count up to old values +- this; null is off."""
    aggregation: Literal["sequence", "token"] = "sequence"
    """Mean over each response's tokens and then over responses, or over all tokens."""
    sampling_logprobs: bool | None = None
    """Take the log-probabilities of the policy that sampled, and a shared critic's values, from the sampling forwards
    instead of a pass of their own over the responses. Null does so where that is exact but for rounding: frozen weights
    and `trainer.precision` of 32 or 64 bits. In 16 bits the two differ by about 0.04 nats a token."""
    importance_weight_cap: float | None = None
    """Weigh each token by the ratio of policy and rollout engine, up to this, such as 2 (truncated importance sampling;
    see `truncated_importance_weights`): for what the mismatch of `rollout.engine: vllm` would distort. Null is off."""
    policy_gradient_clip_val: float | None = 1.0
    """Largest gradient norm of the policy; null is off."""
    critic_gradient_clip_val: float | None = 1.0
    """Largest gradient norm of the critic; null is off."""

    def __post_init__(self) -> None:
        """Raise UserError for values that no run can use."""
        sizes = ("epochs", "minibatch_size", "microbatch_size", "scoring_batch_size")
        limits = ("clip_range", "value_clip_range", "policy_gradient_clip_val", "critic_gradient_clip_val", "kl_stop")
        positive = (*sizes, *limits, "importance_weight_cap")
        check_settings("model.ppo", self, positive, not_negative=("entropy_coefficient",))
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"model.ppo.{name} is {getattr(self, name)}; set it between 0 and 1.")
        if self.dual_clip is not None and not self.dual_clip > 1 + self.clip_range:
            raise UserError(
                f"model.ppo.dual_clip {self.dual_clip} would cut ratios that clip_range {self.clip_range} allows; set "
                "it above 1 + clip_range, or to null."
            )

    @property
    def has_critic(self) -> bool:
        """Whether the estimator reads values."""
        return self.estimator == "gae"

    @property
    def whitens(self) -> bool:
        """Whether advantages are whitened."""
        chosen = self.whiten_advantages
        return self.estimator in WHITENED_ESTIMATORS if chosen is None else chosen

    def check(self, samples: int, ranks: int = 1) -> None:
        """Raise UserError if `samples` of one iteration do not split into the minibatches, or these not over ranks."""
        size = self.minibatch_size or samples
        if size % ranks:
            raise UserError(
                f"the minibatches of {size} responses do not split evenly over {ranks} devices; set ppo.minibatch_size "
                "to a multiple of them."
            )
        if samples % size:
            raise UserError(
                f"ppo.minibatch_size {size} does not divide the {samples} responses of an iteration (data.batch_size "
                "times rollout.responses_per_prompt); set one to a divisor of the other."
            )

    def check_group(self, responses_per_prompt: int) -> None:
        """Raise UserError if the estimator compares responses of a prompt and there is only one."""
        if self.estimator in GROUP_ESTIMATORS and responses_per_prompt < 2:
            raise UserError(
                f"ppo.estimator {self.estimator} compares several responses to a prompt; set "
                "rollout.responses_per_prompt to 2 or more."
            )


@dataclass(frozen=True)
class CriticSettings:
    """What the critic is and where it starts."""

    init: str = "reward"
    """`reward` (the reward role, head rescaled to normalised units), `policy` (the policy's start with a head of
    zeros), or the folder of a saved role."""
    shared: bool = False
    """Read values off the policy's own hidden states by a head of zeros, the only weights of such a critic: one forward
    and one backward train both. `init` is then not read."""
    value_coefficient: float = 0.1
    """Weight of the value loss in what the shared weights learn; only with `shared`."""
    warmup_iterations: int = 0
    """First iterations in which the critic alone is trained."""

    def __post_init__(self) -> None:
        """Raise UserError for values that no run can use."""
        check_settings("model.critic", self, positive=("value_coefficient",), not_negative=("warmup_iterations",))
