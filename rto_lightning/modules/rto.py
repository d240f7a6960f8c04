"""Stage 4: PPO on token rewards.

One `training_step` is one PPO iteration: `rollout`, `score`, `update`. Each is a method of its own; the first two can
be called from a notebook, the third needs the trainer's optimizers. `global_step`, checkpoints, schedules and loggers
count iterations: of all optimizer steps of an iteration only the last goes through Lightning's wrapper, which counts.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from rto_lightning.algorithms import adaptive_kl_coefficient, estimate_advantages, whiten
from rto_lightning.backbone import BackboneSettings, Message
from rto_lightning.data import PromptBatch
from rto_lightning.errors import UserError
from rto_lightning.modules.experience import Experience, PolicyReading, ScoredTrajectory
from rto_lightning.modules.gathering import gather_scored
from rto_lightning.modules.phases import Phases
from rto_lightning.modules.ppo_update import minibatches, ppo_update
from rto_lightning.modules.reading import TrajectoryReader
from rto_lightning.modules.rto_inputs import check_even_rows, check_inputs, reward_sources
from rto_lightning.modules.rto_roles import add_critic, add_dpo, add_policy_average, average_policy, scale_critic
from rto_lightning.modules.rto_settings import CriticSettings, PPOSettings, RewardSettings
from rto_lightning.modules.scoring import read_policy, samples_exactly, score_trajectory, weigh_for_engine
from rto_lightning.modules.stage import StageModule
from rto_lightning.parallel import gather_rows, ranks
from rto_lightning.rewards import WeightedReward, WeightedScores, make_scores
from rto_lightning.rollout import RolloutSettings, Trajectory, build_engine, response_texts, sample_seeds
from rto_lightning.seeding import run_seed
from rto_lightning.strategies import local_gradients

EVALUATION = -1
"""Stands for the iteration in seeds of held-out rollouts, so that these are the same draws each time."""
NORMALIZATION = -2
"""The same for the rollouts of the reference on which scores are normalised."""


class RTOModule(StageModule):
    """Reinforced token optimization; with `rewards.beta_1: 0` it is PPO.

    `validate` and `test` sample answers to held-out prompts and log every reward term without an update; `predict`
    returns the answers.

    Args:
        backbone: The base model and its adapters. Policy and reference start as `backbone.init`, or the base.
        trained: Saved policy role to test, to predict with, or to train further. The reference stays where it is.
        dpo: Saved DPO role, or a model with the same vocabulary, that gives the token rewards.
        dpo_reference: What the DPO role was trained against; null is the reference.
        reward: Saved reward role, or folder or hub name of a sequence-classification model with one label.
        reward_function: A Python function `module:function` in the place of the reward model, called as
            `function(prompts, responses)`; returns a number for each response.
        more_rewards: Further sources of scores; the weighted sum of all is the score.
        rollout: How responses are sampled.
        rewards: The terms of the reward.
        ppo: Advantages, losses and minibatches.
        critic: Where the critic starts; estimators without a critic build none.
        ema_decay: Validate and save the exponential moving average of the policy instead of its last weights; the share
            of the average that an iteration keeps, such as 0.95. Null is off.
        policy_optimizer: Optimizer of the policy.
        critic_optimizer: Optimizer of the critic.
        policy_scheduler: Learning-rate schedule of the policy, stepped once an iteration in which it is trained.
        critic_scheduler: Learning-rate schedule of the critic, stepped once an iteration.
        seed: Seed of the rollouts and of the order of minibatches; null takes `seed_everything`.
    """

    stage_name = "rto"

    def __init__(
        self,
        backbone: BackboneSettings,
        trained: str | None = None,
        dpo: str | None = None,
        dpo_reference: str | None = None,
        reward: str | None = None,
        reward_function: str | None = None,
        more_rewards: list[WeightedReward] | None = None,
        rollout: RolloutSettings = RolloutSettings(),  # noqa: B008
        rewards: RewardSettings = RewardSettings(),  # noqa: B008
        ppo: PPOSettings = PPOSettings(),  # noqa: B008
        critic: CriticSettings = CriticSettings(),  # noqa: B008
        ema_decay: float | None = None,
        policy_optimizer: OptimizerCallable = torch.optim.AdamW,
        critic_optimizer: OptimizerCallable = torch.optim.AdamW,
        policy_scheduler: LRSchedulerCallable | None = None,
        critic_scheduler: LRSchedulerCallable | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(backbone, trained, policy_optimizer, policy_scheduler)
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise UserError(f"model.ema_decay is {ema_decay}; set it between 0 and 1, or to null.")
        self.sources = reward_sources(reward, reward_function, more_rewards or [], rewards.beta_3)
        check_inputs(dpo, self.sources, rewards, ppo, critic)
        rollout.check(rewards.min_response_tokens, ppo.sampling_logprobs, ppo.importance_weight_cap)
        self.automatic_optimization = False
        self.dpo, self.dpo_reference = dpo, dpo_reference
        self.rollout_settings, self.rewards, self.ppo, self.critic = rollout, rewards, ppo, critic
        self.ema_decay = ema_decay
        self.critic_optimizer, self.critic_scheduler = critic_optimizer, critic_scheduler
        self.seed = run_seed(seed)
        self.phases = Phases()
        self.scores: WeightedScores | None = None
        self._schedulers: dict[str, Any] = {}
        self.register_buffer("kl_coefficient", torch.tensor(rewards.beta_2, dtype=torch.float64))
        self.kl_coefficient: Tensor
        self.last_rollout: tuple[Trajectory, list[list[Message]]]
        """This rank's responses of the last iteration and the messages of their prompts, for callbacks."""

    # Roles -----------------------------------------------------------------------------------------------------

    def add_roles(self) -> None:
        """Add reference and policy."""
        self.add_reference()
        if self.settings.init is not None and self.trained is None:
            self.backbone.copy_role("reference", "policy", trainable=True)
        else:
            self.add_policy()
        self.engine = build_engine(self.backbone, self.rollout_settings)
        self.reader = TrajectoryReader(self.backbone, self.ppo.scoring_batch_size or 2 * self.ppo.microbatch_size)

    def add_roles_of_task(self) -> None:
        """Add the roles that the trainer's task needs: `predict` scores nothing."""
        if self.ema_decay is not None and "policy_average" not in self.backbone.roles:
            add_policy_average(self.backbone)
        if self._trainer is None or not self.trainer.predicting:
            self._add_reward_roles()
        if self._trainer is None or self.trainer.training:
            self._add_training_roles()

    def _add_reward_roles(self) -> None:
        if self.rewards.beta_1 != 0 and "dpo" not in self.backbone.roles:
            assert self.dpo is not None
            add_dpo(self.backbone, self.dpo, self.dpo_reference, self.init_fingerprint)
        if self.rewards.beta_3 != 0 and self.scores is None:
            self.scores = make_scores(self.backbone, self.sources, self.rewards.normalize_score)
            if (card := self.backbone.cards.get("policy")) is not None:
                self.scores.restore(card.settings.get("score_statistics", {}))

    def _add_training_roles(self) -> None:
        if self.ppo.has_critic and "critic" not in self.backbone.roles:
            add_critic(self.backbone, self.critic)
            if self.scores is not None:
                scale_critic(self.backbone, self.critic, self.scores, self.rewards.beta_3)

    @property
    def saved_role(self) -> str:
        """The policy, or its moving average."""
        return "policy_average" if "policy_average" in self.backbone.roles else "policy"

    def setup(self, stage: str) -> None:
        """As :meth:`StageModule.setup`; raises UserError also for rollouts that cannot be made or trained on."""
        super().setup(stage)
        self.rollout_settings.check_engine(training=stage == "fit")
        if stage == "fit":
            self.ppo.check_group(self.rollout_settings.responses_per_prompt)

    def teardown(self, stage: str) -> None:
        """Give back what the rollout engine holds."""
        self.engine.close()

    def named_optimizers(self) -> dict[str, OptimizerCallable]:
        """As :meth:`StageModule.named_optimizers`."""
        critic = {"model.critic_optimizer": self.critic_optimizer} if self.ppo.has_critic else {}
        return {"model.policy_optimizer": self.optimizer, **critic}

    def configure_optimizers(self) -> Any:
        """Policy and, with a critic, critic, in this order, each with its own schedule."""
        optimizers = {"policy": self.optimizer(self.backbone.trained_parameters("policy"))}
        schedules = {"policy": self.lr_scheduler}
        if self.ppo.has_critic:
            optimizers["critic"] = self.critic_optimizer(self.backbone.trained_parameters("critic"))
            schedules["critic"] = self.critic_scheduler
        self._schedulers = {name: make(optimizers[name]) for name, make in schedules.items() if make is not None}
        return list(optimizers.values()), [{"scheduler": scheduler} for scheduler in self._schedulers.values()]

    def on_fit_start(self) -> None:
        """Check the batch size; measure score statistics if neither a role nor a checkpoint brought them."""
        self.ppo.check(self._datamodule.batch_size * self.rollout_settings.responses_per_prompt, ranks())
        self._measure_if_needed(self._first_epoch, shared_out=True)

    def on_validation_start(self) -> None:
        """Measure score statistics on the validation prompts, if they are unknown."""
        self._measure_if_needed(self._datamodule.val_dataloader)

    def on_test_start(self) -> None:
        """Measure score statistics on the test prompts, if they are unknown."""
        self._measure_if_needed(self._datamodule.test_dataloader)

    @torch.no_grad()
    def measure_score_statistics(self, batches: Iterable[PromptBatch], shared_out: bool = False) -> None:
        """Set mean and standard deviation of the scores from answers of the reference policy.

        Args:
            batches: prompts; `rewards.normalization_samples` of them are answered.
            shared_out: whether each rank has a share of a batch, rather than all of it.

        Raises:
            UserError: if all answers have the same score.
        """
        assert self.scores is not None
        wanted, scores = self.rewards.normalization_samples, torch.empty(0)
        for batch in batches:
            batch = batch.to(self.device)
            seeds = sample_seeds(self.seed, NORMALIZATION, batch.index)
            trajectory = self.engine.rollout("reference", batch.input_ids, batch.attention_mask, seeds)
            of_batch = self.reader.scores(self.scores, trajectory, batch.messages)
            scores = torch.cat([scores, (gather_rows(of_batch) if shared_out else of_batch).cpu()])
            if len(scores) >= wanted:
                break
        units_are_new = not self.scores.normalizer().ready
        self.scores.measure(scores[:wanted])
        if units_are_new and self.critic.init == "reward" and "critic" in self.backbone.roles:
            scale_critic(self.backbone, self.critic, self.scores, self.rewards.beta_3)

    # One iteration ------------------------------------------------------------------------------------------------

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """One PPO iteration."""
        iteration = self.global_step
        batch = batch.repeated(self.rollout_settings.responses_per_prompt)
        with self.phases.phase("rollout", self.trainer):
            trajectory = self.rollout(batch, iteration)
        with self.phases.phase("scoring", self.trainer):
            experience = self.score(trajectory, batch.messages)
        with self.phases.phase("update", self.trainer):
            losses = self.update(experience, iteration)
            if self.ema_decay is not None:
                average_policy(self.backbone, self.ema_decay)
        self.last_rollout = trajectory, batch.messages
        samples = len(experience.mask)
        metrics: dict[str, Tensor | float] = {**experience.metrics(), **losses, **self.phases.finish(samples)}
        metrics["kl_coefficient"] = float(self.kl_coefficient)
        if self.rewards.kl_target is not None and "policy/loss" in losses:  # not while the critic alone is trained
            before, aim = float(self.kl_coefficient), (self.rewards.kl_target, self.rewards.kl_horizon)
            self.kl_coefficient.fill_(adaptive_kl_coefficient(before, float(metrics["kl"]), *aim, samples))
        shown = {"reward/total", "score", "kl"}
        for name, value in metrics.items():
            self.log(f"train/{name}", value, prog_bar=name in shown, batch_size=samples)

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
    def score(self, trajectory: Trajectory, prompts: list[list[Message]]) -> Experience:
        """Rewards as `reward` gives them, and the advantages and returns that policy and critic are trained on.

        Every rank reads the responses to its own prompts; what comes out are the samples of all ranks.

        Args:
            trajectory: B prompts with a response each; responses to one prompt are neighbours.
            prompts: the messages of the prompts, for reward sources that read text.
        """
        ppo, group_size = self.ppo, self.rollout_settings.responses_per_prompt
        policy = read_policy(self.reader, "policy", trajectory, self._temperature, self._value_role)
        scored = self._reward(trajectory, policy, prompts)
        values = policy.values
        if ppo.has_critic and values is None:
            values = self.reader.values("critic", trajectory)
        scored, values = gather_scored(scored, values)
        advantages, returns = estimate_advantages(
            ppo.estimator, scored.terms, scored.mask, ppo.gamma, ppo.lam, values, group_size
        )
        if ppo.whitens:
            advantages = whiten(advantages, scored.mask)
        advantages = weigh_for_engine(advantages, scored, ppo.importance_weight_cap)
        return Experience(**vars(scored), values=values, advantages=advantages, returns=returns)

    def update(self, experience: Experience, iteration: int) -> dict[str, Tensor]:
        """Epochs x minibatches x microbatches of policy and value loss.

        Args:
            experience: what `score` returned, B samples; of each minibatch every rank trains on a share.
            iteration: enters the seed of the minibatch order; the policy waits for the critic's warm-up.

        Returns:
            Means over the minibatches, for the log.
        """
        self.ppo.check(samples := len(experience.mask), ranks())
        optimizers = self.optimizers()
        policy, critic = optimizers if isinstance(optimizers, list) else (optimizers, None)
        train_policy = critic is None or iteration >= self.critic.warmup_iterations
        with local_gradients(self.trainer.strategy):
            metrics = ppo_update(
                self.backbone,
                experience,
                minibatches(samples, self.ppo, self.seed, iteration),
                self.ppo,
                self.rollout_settings.temperature,
                self.manual_backward,
                policy if train_policy else None,
                critic,
                self.critic.value_coefficient if critic is not None and self.critic.shared else None,
            )
        for name, scheduler in self._schedulers.items():
            if name == "critic" or train_policy:
                scheduler.step()
        return metrics

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Plain: the losses of policy and critic each run it within their own role."""
        loss.backward(*args, **kwargs)

    # Held-out prompts -------------------------------------------------------------------------------------------

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

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that lacks the moving average which the settings ask for, by a UserError."""
        if self.ema_decay is not None and not any("policy_average" in name for name in checkpoint["state_dict"]):
            raise UserError("the checkpoint holds no moving average of the policy; set model.ema_decay to null.")

    def role_settings(self) -> dict[str, Any]:
        """The statistics by which scores were normalised, so that a test of the policy takes the same."""
        return {"score_statistics": self.scores.statistics()} if self.scores is not None else {}

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
