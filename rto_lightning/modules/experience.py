"""What one RTO iteration knows of its trajectory."""

from dataclasses import dataclass

from torch import Tensor

from rto_lightning.algorithms import RewardTerms, engine_mismatch, explained_variance, masked_mean, masked_sum
from rto_lightning.rollout import Trajectory


@dataclass(frozen=True)
class PolicyReading:
    """What the policy says of its responses, (B, T) each and 0 outside of them."""

    logprobs: Tensor
    """Log-probability of each response token, nats."""
    entropy: Tensor
    """Of the distribution before each token, nats."""
    values: Tensor | None = None
    """Of a critic on the policy's hidden states, before each token, in units of the reward; None without one."""


@dataclass(frozen=True)
class RewardedTrajectory:
    """A trajectory with what the roles say of it. All (B, T) fields are 0 outside the response."""

    trajectory: Trajectory
    """The prompts and responses."""
    logprobs: Tensor
    """Of the policy that sampled them, by the training forward or, if as exact, the sampling one, (B, T), nats."""
    entropy: Tensor
    """Of the policy before each token, (B, T), nats."""
    kl: Tensor
    """log(policy / reference) of each token, (B, T), nats."""
    scores: Tensor | None
    """What each of S reward sources said, in its own units, (B, S); None without one."""
    terms: RewardTerms
    """The summands of the reward."""

    @property
    def mask(self) -> Tensor:
        """True on response tokens, (B, T) bool."""
        return self.trajectory.sequences.response_mask

    def metrics(self) -> dict[str, Tensor]:
        """Means over responses (sums over their tokens where the quantity adds up), for the log."""
        mask, lengths = self.mask, self.trajectory.sequences.response_lengths.float()
        result = {
            "reward/token": masked_sum(self.terms.token, mask, dim=1).mean(),
            "reward/kl": masked_sum(self.terms.kl, mask, dim=1).mean(),
            "reward/score": masked_sum(self.terms.score, mask, dim=1).mean(),
            "reward/total": masked_sum(self.terms.total, mask, dim=1).mean(),
            "kl": masked_sum(self.kl, mask, dim=1).mean(),
            "entropy": masked_mean(self.entropy, mask),
            "response/length": lengths.mean(),
            "response/truncated": self.trajectory.truncated.float().mean(),
        }
        for number, scores in enumerate(() if self.scores is None else self.scores.T, start=1):
            name = "score" if number == 1 else f"score_{number}"
            result[name] = scores.mean()
            result[f"{name}_std"] = scores.std(correction=0)
        if (of_engine := self.trajectory.engine_logprobs) is not None:
            mismatch = engine_mismatch(self.logprobs, of_engine, mask)
            result |= dict(zip(("rollout/mismatch", "rollout/mismatch_kl"), mismatch, strict=True))
        return result


@dataclass(frozen=True)
class Experience(RewardedTrajectory):
    """A rewarded trajectory with what policy and critic are trained on."""

    values: Tensor | None
    """Of the critic before each token, (B, T), in units of the reward; None without a critic."""
    advantages: Tensor
    """As the policy loss uses them, whitened and weighed for the rollout's engine if so set, (B, T)."""
    returns: Tensor
    """Targets of the critic, or the return to go without one, (B, T)."""

    def metrics(self) -> dict[str, Tensor]:
        """Those of the rewarded trajectory, and of the critic."""
        result = super().metrics()
        if self.values is not None:
            result |= {
                "critic/value": masked_mean(self.values, self.mask),
                "critic/error": masked_mean((self.values - self.returns).abs(), self.mask),
                "critic/explained_variance": explained_variance(self.values, self.returns, self.mask),
            }
        return result
