"""Answers to prompts and the reward of each of their tokens: what RTO trains on, and what it validates and tests by."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from rto_lightning.backbone import BackboneSettings, Message
from rto_lightning.data import PromptBatch
from rto_lightning.modules.experience import PolicyReading, RewardedTrajectory
from rto_lightning.modules.numerics import NumericsSettings
from rto_lightning.modules.reading import TrajectoryReader, reads_while_sampling
from rto_lightning.modules.rewarding import reward_trajectory
from rto_lightning.modules.rto_inputs import check_even_rows, check_rewards
from rto_lightning.modules.rto_roles import add_dpo
from rto_lightning.modules.rto_settings import RewardSettings
from rto_lightning.modules.score_statistics import collect_scores
from rto_lightning.modules.stage import StageModule
from rto_lightning.parallel import gather_rows
from rto_lightning.rewards import WeightedReward, WeightedScores, make_scores
from rto_lightning.rollout import RolloutSettings, Trajectory, build_engine, response_texts, sample_seeds
from rto_lightning.seeding import run_seed

EVALUATION = -1
"""Stands for the iteration in seeds of held-out rollouts, so that these are the same draws each time."""
NORMALIZATION = -2
"""The same for the rollouts of the reference on which scores are normalised."""


class RewardedRollouts(StageModule):
    """The part of :class:`RTOModule` that changes no weight: rollouts, rewards, `validate`, `test` and `predict`.

    Args:
        backbone: As of RTO, like all that is not described here.
        trained: Saved policy role.
        dpo: Where token rewards come from.
        dpo_reference: What that was trained against.
        sources: Where the scores come from, those of each response added up with the weights.
        rollout: How responses are sampled.
        rewards: The terms of the reward.
        sampling_logprobs: Whether the sampling forwards give the policy's log-probabilities; see `ppo`.
        scoring_batch_size: Samples for each forward over responses.
        optimizer: Optimizer of the policy.
        lr_scheduler: Its schedule.
        seed: Seed of the rollouts.
        numerics: What happens when something is NaN or infinite.
    """

    def __init__(
        self,
        backbone: BackboneSettings,
        trained: str | None,
        dpo: str | None,
        dpo_reference: str | None,
        sources: Sequence[WeightedReward],
        rollout: RolloutSettings,
        rewards: RewardSettings,
        sampling_logprobs: bool | None,
        scoring_batch_size: int,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        seed: int | None,
        numerics: NumericsSettings,
    ) -> None:
        super().__init__(backbone, trained, optimizer, lr_scheduler, numerics)
        check_rewards(dpo, sources, rewards)
        self.dpo, self.dpo_reference, self.sources = dpo, dpo_reference, sources
        self.rollout_settings, self.rewards = rollout, rewards
        self.sampling_logprobs, self.scoring_batch_size = sampling_logprobs, scoring_batch_size
        self.seed = run_seed(seed)
        self.scores: WeightedScores | None = None
        self.register_buffer("kl_coefficient", torch.tensor(rewards.beta_2, dtype=torch.float64))
        self.kl_coefficient: Tensor

    # Roles -----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """As :meth:`StageModule.setup`; raises UserError also for rollouts that cannot be made."""
        super().setup(stage)
        self.rollout_settings.check_engine(training=stage == "fit")

    def add_roles(self) -> None:
        """Add reference and policy."""
        self.add_reference()
        if self.settings.init is not None and self.trained is None:
            self.backbone.copy_role("reference", "policy", trainable=True)
        else:
            self.add_policy()
        self.engine = build_engine(self.backbone, self.rollout_settings)
        self.reader = TrajectoryReader(self.backbone, self.scoring_batch_size)

    def add_roles_of_task(self) -> None:
        """Add the roles that reward, unless the trainer predicts, which rewards nothing."""
        if self._trainer is not None and self.trainer.predicting:
            return
        if self.rewards.beta_1 != 0 and "dpo" not in self.backbone.roles:
            assert self.dpo is not None
            add_dpo(self.backbone, self.dpo, self.dpo_reference, self.init_fingerprint)
        if self.rewards.beta_3 != 0 and self.scores is None:
            self.scores = make_scores(self.backbone, self.sources, self.rewards.normalize_score)
            if (card := self.backbone.cards.get("policy")) is not None:
                self.scores.restore(card.settings.get("score_statistics", {}))

    def teardown(self, stage: str) -> None:
        """Give back what the rollout engine holds."""
        self.engine.close()

    @property
    def value_role(self) -> str | None:
        """A role whose values rollouts of the policy bring along, read off its own hidden states; None without one."""
        return None

    @property
    def source_names(self) -> list[str]:
        """What messages call the reward sources."""
        return [source.name for source in self.scores.sources] if self.scores is not None else []

    def role_settings(self) -> dict[str, Any]:
        """The statistics by which scores were normalised, so that a test of the policy takes the same."""
        return {"score_statistics": self.scores.statistics()} if self.scores is not None else {}

    # Rollouts and rewards -----------------------------------------------------------------------------------------

    def rollout(self, batch: PromptBatch, iteration: int, role: str = "policy") -> Trajectory:
        """Sample a response to each prompt.

        Args:
            batch: B prompts; for several responses to each, `batch.repeated(times)`.
            iteration: enters the seed of each sample, with the run's seed and the prompt's row.
            role: who answers.
        """
        seeds = sample_seeds(self.seed, iteration, batch.index)
        keep, value_role = self._keeps_sampling_logprobs, self.value_role
        head = self.backbone.head(value_role) if keep and role == "policy" and value_role is not None else None
        prompts = batch.input_ids, batch.attention_mask
        return self.engine.rollout(role, *prompts, seeds, with_logprobs=keep, value_head=head)

    @torch.no_grad()
    def reward(self, trajectory: Trajectory, prompts: list[list[Message]], role: str = "policy") -> RewardedTrajectory:
        """Read the trajectory as every role but the critic and turn that into the reward of every token.

        Args:
            trajectory: B prompts with a response each.
            prompts: the messages of the prompts, for reward sources that read text.
            role: whose responses they are.
        """
        return self.reward_of(trajectory, self.reader.policy(role, trajectory, self.read_temperature), prompts)

    def reward_of(
        self, trajectory: Trajectory, policy: PolicyReading, prompts: list[list[Message]]
    ) -> RewardedTrajectory:
        """As :meth:`reward`, where the policy has read the trajectory already."""
        settings = self.read_temperature, self.rewards, float(self.kl_coefficient)
        return reward_trajectory(self.reader, trajectory, policy, prompts, *settings, self.scores)

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

        sources.measure(collect_scores(batches, score, self.rewards.normalization_samples, self.guard.settings))

    def measure_if_needed(self, dataloader: Callable[[], Iterable[PromptBatch]], shared_out: bool = False) -> None:
        """As :meth:`measure_score_statistics`, if neither a role nor a checkpoint brought them."""
        if self.scores is not None and not self.scores.ready:
            self.measure_score_statistics(dataloader(), shared_out)

    @property
    def read_temperature(self) -> float:
        """At which policy and reference are read; greedy answers are read at 1."""
        return self.rollout_settings.temperature or 1.0

    @property
    def _keeps_sampling_logprobs(self) -> bool:
        if self._trainer is not None and self.trainer.predicting:
            return False
        precision = str(self.trainer.precision) if self._trainer is not None else "32-true"
        return reads_while_sampling(self.sampling_logprobs, self.settings, precision)

    # Held-out prompts -------------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Measure score statistics on the validation prompts, if they are unknown."""
        self.measure_if_needed(self._datamodule.val_dataloader)

    def on_test_start(self) -> None:
        """Measure score statistics on the test prompts, if they are unknown."""
        self.measure_if_needed(self._datamodule.test_dataloader)

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

    def _evaluate(self, batch: PromptBatch, split: str) -> None:
        trajectory = self.rollout(batch, EVALUATION, self.saved_role)
        shown = {"reward/total", "kl"}
        for name, value in self.reward(trajectory, batch.messages, self.saved_role).metrics().items():
            self.log_mean(f"{split}/{name}", value.float(), len(batch), shown=name in shown)
