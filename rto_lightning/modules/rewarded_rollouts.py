"""Answers to prompts and the reward of each of their tokens: what RTO trains on, and what it validates and tests by."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from rto_lightning.backbone import Message
from rto_lightning.data import PromptBatch
from rto_lightning.modules.experience import PolicyReading, ScoredTrajectory
from rto_lightning.modules.reading import TrajectoryReader
from rto_lightning.modules.rto_inputs import check_even_rows
from rto_lightning.modules.rto_roles import scale_critic
from rto_lightning.modules.rto_settings import CriticSettings, PPOSettings, RewardSettings
from rto_lightning.modules.score_statistics import collect_scores
from rto_lightning.modules.scoring import read_policy, samples_exactly, score_trajectory
from rto_lightning.modules.stage import StageModule
from rto_lightning.parallel import gather_rows
from rto_lightning.rewards import WeightedScores
from rto_lightning.rollout import RolloutEngine, RolloutSettings, Trajectory, response_texts, sample_seeds

EVALUATION = -1
"""Stands for the iteration in seeds of held-out rollouts, so that these are the same draws each time."""
NORMALIZATION = -2
"""The same for the rollouts of the reference on which scores are normalised."""


class RewardedRollouts(StageModule):
    """The part of :class:`RTOModule` that changes no weight: rollouts, rewards, `validate`, `test` and `predict`."""

    rollout_settings: RolloutSettings
    rewards: RewardSettings
    ppo: PPOSettings
    critic: CriticSettings
    seed: int
    engine: RolloutEngine
    reader: TrajectoryReader
    scores: WeightedScores | None
    kl_coefficient: Tensor

    def rollout(self, batch: PromptBatch, iteration: int, role: str = "policy") -> Trajectory:
        """Sample a response to each prompt.

        Args:
            batch: B prompts; for several responses to each, `batch.repeated(times)`.
            iteration: enters the seed of each sample, with the run's seed and the prompt's row.
            role: who answers.
        """
        seeds = sample_seeds(self.seed, iteration, batch.index)
        keep = self._keeps_sampling_logprobs
        head = self.backbone.head(self._value_role) if keep and role == "policy" and self._value_role else None
        prompts = batch.input_ids, batch.attention_mask
        return self.engine.rollout(role, *prompts, seeds, with_logprobs=keep, value_head=head)

    @torch.no_grad()
    def reward(self, trajectory: Trajectory, prompts: list[list[Message]], role: str = "policy") -> ScoredTrajectory:
        """Read the trajectory as every role but the critic and turn that into the reward of every token.

        Args:
            trajectory: B prompts with a response each.
            prompts: the messages of the prompts, for reward sources that read text.
            role: whose responses they are.
        """
        policy = read_policy(self.reader, role, trajectory, self._temperature)
        return self._reward(trajectory, policy, prompts)

    @torch.no_grad()
    def measure_score_statistics(self, batches: Iterable[PromptBatch], shared_out: bool = False) -> None:
        """Set mean and standard deviation of the scores from answers of the reference policy.

        Args:
            batches: prompts; `rewards.normalization_samples` of them are answered.
            shared_out: whether each rank has a share of a batch, rather than all of it.

        Raises:
            UserError: if all answers have the same score, or one that is not finite.
        """
        assert self.scores is not None
        sources = self.scores

        def score(batch: PromptBatch) -> Tensor:
            batch = batch.to(self.device)
            seeds = sample_seeds(self.seed, NORMALIZATION, batch.index)
            trajectory = self.engine.rollout("reference", batch.input_ids, batch.attention_mask, seeds)
            scores = self.reader.scores(sources, trajectory, batch.messages)
            return gather_rows(scores) if shared_out else scores

        units_are_new = not sources.normalizer().ready
        sources.measure(collect_scores(batches, score, self.rewards.normalization_samples, self.guard.settings))
        if units_are_new and self.critic.init == "reward" and "critic" in self.backbone.roles:
            scale_critic(self.backbone, self.critic, self.scores, self.rewards.beta_3)

    @property
    def source_names(self) -> list[str]:
        """What messages call the reward sources."""
        return [source.name for source in self.scores.sources] if self.scores is not None else []

    def role_settings(self) -> dict[str, Any]:
        """The statistics by which scores were normalised, so that a test of the policy takes the same."""
        return {"score_statistics": self.scores.statistics()} if self.scores is not None else {}

    # Held-out prompts -------------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Measure score statistics on the validation prompts, if they are unknown."""
        self._measure_if_needed(self._datamodule.val_dataloader)

    def on_test_start(self) -> None:
        """Measure score statistics on the test prompts, if they are unknown."""
        self._measure_if_needed(self._datamodule.test_dataloader)

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Every reward term on answers to held-out prompts."""
        self._evaluate(batch, "validation")

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Every reward term on answers to test prompts."""
        self._evaluate(batch, "test")

    def on_predict_start(self) -> None:
        """Refuse rows of which some ranks have one more than others, where all compute a batch together."""
        check_even_rows(self.trainer, together=self.is_sharded or self.rollout_settings.engine == "vllm")

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """The answers: for each prompt its row, its messages, the response text and whether it was truncated."""
        trajectory = self.rollout(batch, EVALUATION, self.saved_role)
        return [
            {"index": int(index), "prompt": prompt, "response": text, "truncated": bool(truncated)}
            for index, prompt, text, truncated in zip(
                batch.index, batch.messages, response_texts(trajectory, self.chat), trajectory.truncated, strict=True
            )
        ]

    # Inside -----------------------------------------------------------------------------------------------------

    def _measure_if_needed(self, dataloader: Callable[[], Iterable[PromptBatch]], shared_out: bool = False) -> None:
        if self.scores is not None and not self.scores.ready:
            self.measure_score_statistics(dataloader(), shared_out)

    @property
    def _temperature(self) -> float:
        """At which policy and reference are read; greedy answers are read at 1."""
        return self.rollout_settings.temperature or 1.0

    @property
    def _value_role(self) -> str | None:
        """The critic, if it is there and read off the policy's own forward."""
        return "critic" if self.critic.shared and "critic" in self.backbone.roles else None

    @property
    def _keeps_sampling_logprobs(self) -> bool:
        if self._trainer is not None and self.trainer.predicting:
            return False
        if self.ppo.sampling_logprobs is not None:
            return self.ppo.sampling_logprobs
        precision = str(self.trainer.precision) if self._trainer is not None else "32-true"
        return samples_exactly(self.settings.frozen_dtype, self.settings.quantization is not None, precision)

    def _reward(self, trajectory: Trajectory, policy: PolicyReading, prompts: list[list[Message]]) -> ScoredTrajectory:
        settings = self._temperature, self.rewards, float(self.kl_coefficient)
        return score_trajectory(self.reader, trajectory, policy, prompts, *settings, self.scores)

    def _evaluate(self, batch: PromptBatch, split: str) -> None:
        trajectory = self.rollout(batch, EVALUATION, self.saved_role)
        shown = {"reward/total", "kl"}
        for name, value in self.reward(trajectory, batch.messages, self.saved_role).metrics().items():
            self.log_mean(f"{split}/{name}", value.float(), len(batch), shown=name in shown)
