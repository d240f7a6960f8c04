"""Stage 4: PPO on token rewards.

One `training_step` is one PPO iteration: `rollout`, `score`, `update`. Each is a method of its own; the first two can
be called from a notebook, the third needs the trainer's optimizers. `global_step`, checkpoints, schedules and loggers
count iterations: of all optimizer steps of an iteration only the last goes through Lightning's wrapper, which counts.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from rto_lightning.algorithms import (
    adaptive_kl_coefficient,
    compose_rewards,
    generalized_advantages,
    kl_estimate,
    whiten,
)
from rto_lightning.backbone import BackboneSettings, Message, RoleCard
from rto_lightning.data import PromptBatch
from rto_lightning.errors import UserError
from rto_lightning.modules.experience import Experience
from rto_lightning.modules.phases import Phases
from rto_lightning.modules.ppo_gradients import accumulate_policy_gradients, accumulate_value_gradients
from rto_lightning.modules.reading import TrajectoryReader
from rto_lightning.modules.rto_inputs import check_inputs
from rto_lightning.modules.rto_settings import CriticSettings, PPOSettings, RewardSettings
from rto_lightning.modules.stage import StageModule
from rto_lightning.rewards import (
    RewardSource,
    ScoreNormalizer,
    make_reward_source,
    score_statistics,
)
from rto_lightning.rollout import RolloutSettings, Trajectory, TransformersEngine, response_texts, sample_seeds
from rto_lightning.seeding import derive_seed, run_seed

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
        rollout: How responses are sampled.
        rewards: The terms of the reward.
        ppo: Advantages, losses and minibatches.
        critic: Where the critic starts.
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
        rollout: RolloutSettings = RolloutSettings(),  # noqa: B008
        rewards: RewardSettings = RewardSettings(),  # noqa: B008
        ppo: PPOSettings = PPOSettings(),  # noqa: B008
        critic: CriticSettings = CriticSettings(),  # noqa: B008
        policy_optimizer: OptimizerCallable = torch.optim.AdamW,
        critic_optimizer: OptimizerCallable = torch.optim.AdamW,
        policy_scheduler: LRSchedulerCallable | None = None,
        critic_scheduler: LRSchedulerCallable | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(backbone, trained, policy_optimizer, policy_scheduler)
        check_inputs(dpo, reward, reward_function, rewards, critic)
        self.automatic_optimization = False
        self.dpo, self.dpo_reference = dpo, dpo_reference
        self.reward, self.reward_function = reward, reward_function
        self.rollout_settings, self.rewards, self.ppo, self.critic = rollout, rewards, ppo, critic
        self.critic_optimizer, self.critic_scheduler = critic_optimizer, critic_scheduler
        self.seed = run_seed(seed)
        self.phases = Phases()
        self.reward_source: RewardSource | None = None
        self._schedulers: dict[str, Any] = {}
        self.register_buffer("kl_coefficient", torch.tensor(rewards.beta_2, dtype=torch.float64))
        self.kl_coefficient: Tensor
        self.score_normalizer = ScoreNormalizer(rewards.normalize_score)
        self.last_rollout: tuple[Trajectory, list[list[Message]]]
        """Responses of the last iteration and the messages of their prompts, for callbacks."""

    # Roles -----------------------------------------------------------------------------------------------------

    def add_roles(self) -> None:
        """Add reference and policy, and of dpo, reward and critic those that the coefficients ask for."""
        self.add_reference()
        if self.settings.init is not None and self.trained is None:
            self.backbone.copy_role("reference", "policy", trainable=True)
        else:
            self.add_policy()
        self.engine = TransformersEngine(self.backbone, self.rollout_settings)
        self.reader = TrajectoryReader(self.backbone, self.ppo.scoring_batch_size or 2 * self.ppo.microbatch_size)
        if self._trainer is not None and self.trainer.predicting:
            return  # answers need the policy alone
        if self.rewards.beta_1 != 0:
            self._add_dpo()
        if self.rewards.beta_3 != 0:
            source = make_reward_source(self.backbone, self.reward, self.reward_function)
            if isinstance(source, nn.Module):
                self.outside_reward_model = source  # registered, so that it moves to the device
            self.reward_source = source
        if self.critic.init == "reward":
            self.backbone.copy_role("reward", "critic", trainable=True, scalar_head=True)
        elif self.critic.init == "policy":
            self.backbone.copy_role("reference", "critic", trainable=True, scalar_head=True)
        else:
            self.backbone.add_role("critic", self.critic.init, trainable=True, scalar_head=True)
        for card in (self.backbone.cards.get("reward"), self.backbone.cards.get("policy")):
            if card is not None and card.score_mean is not None and card.score_std is not None:
                self._set_score_statistics(card.score_mean, card.score_std)
                break

    def setup(self, stage: str) -> None:
        """As :meth:`StageModule.setup`; also refuses what one iteration cannot do.

        Raises:
            UserError: for several devices, or sampling at temperature 0 in training.
        """
        super().setup(stage)
        if self.trainer.world_size > 1:
            raise UserError("RTO runs on one device in this version; set trainer.devices to 1.")
        if stage == "fit" and self.rollout_settings.temperature <= 0:
            raise UserError("rollout.temperature is 0, which gives PPO nothing to learn from; set it above 0.")

    def configure_optimizers(self) -> Any:
        """Policy and critic, in this order, each with its own schedule."""
        policy = self.optimizer(self.backbone.trained_parameters("policy"))
        critic = self.critic_optimizer(self.backbone.trained_parameters("critic"))
        schedules = {"policy": (self.lr_scheduler, policy), "critic": (self.critic_scheduler, critic)}
        self._schedulers = {name: make(optimizer) for name, (make, optimizer) in schedules.items() if make is not None}
        return [policy, critic], [{"scheduler": scheduler} for scheduler in self._schedulers.values()]

    def on_fit_start(self) -> None:
        """Check the batch size; measure score statistics if neither a role nor a checkpoint brought them."""
        self.ppo.check(self._datamodule.batch_size)
        self._measure_if_needed(self._datamodule.train_dataloader)

    def on_validation_start(self) -> None:
        """Measure score statistics on the validation prompts, if they are unknown."""
        self._measure_if_needed(self._datamodule.val_dataloader)

    def on_test_start(self) -> None:
        """Measure score statistics on the test prompts, if they are unknown."""
        self._measure_if_needed(self._datamodule.test_dataloader)

    @torch.no_grad()
    def measure_score_statistics(self, batches: Iterable[PromptBatch]) -> None:
        """Set mean and standard deviation of the scores from answers of the reference policy.

        Args:
            batches: prompts; `rewards.normalization_samples` of them are answered.

        Raises:
            UserError: if all answers have the same score.
        """
        assert self.reward_source is not None
        wanted, scores = self.rewards.normalization_samples, torch.empty(0)
        for batch in batches:
            batch = batch.to(self.device)
            seeds = sample_seeds(self.seed, NORMALIZATION, batch.index)
            trajectory = self.engine.rollout("reference", batch.input_ids, batch.attention_mask, seeds)
            scores = torch.cat([scores, self.reader.scores(self.reward_source, trajectory, batch.messages).cpu()])
            if len(scores) >= wanted:
                break
        mean, std = score_statistics(scores[:wanted], self.reward_source.name).tolist()
        self._set_score_statistics(mean, std)

    # One iteration ------------------------------------------------------------------------------------------------

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """One PPO iteration."""
        iteration = self.global_step
        with self.phases.phase("rollout", self.trainer):
            trajectory = self.rollout(batch, iteration)
        with self.phases.phase("scoring", self.trainer):
            experience = self.score(trajectory, batch.messages)
        with self.phases.phase("update", self.trainer):
            losses = self.update(experience, iteration)
        self.last_rollout = trajectory, batch.messages
        metrics: dict[str, Tensor | float] = {**experience.metrics(), **losses, **self.phases.finish(len(batch))}
        metrics["kl_coefficient"] = float(self.kl_coefficient)
        self._adapt_kl_coefficient(float(metrics["kl"]), len(batch))
        shown = {"reward/total", "score", "kl"}
        for name, value in metrics.items():
            self.log(f"train/{name}", value, prog_bar=name in shown, batch_size=len(batch))

    def rollout(self, batch: PromptBatch, iteration: int) -> Trajectory:
        """Sample a response of the policy to each prompt.

        Args:
            batch: B prompts.
            iteration: enters the seed of each sample, with the run's seed and the prompt's row.
        """
        seeds = sample_seeds(self.seed, iteration, batch.index)
        return self.engine.rollout("policy", batch.input_ids, batch.attention_mask, seeds)

    @torch.no_grad()
    def score(self, trajectory: Trajectory, prompts: list[list[Message]]) -> Experience:
        """Read the trajectory as every role and turn that into rewards, advantages and returns.

        Args:
            trajectory: B prompts with a response each.
            prompts: the messages of the prompts, for reward sources that read text.
        """
        temperature, mask = self.rollout_settings.temperature or 1.0, trajectory.sequences.response_mask
        logprobs, entropy = self.reader.logprobs_and_entropy("policy", trajectory, temperature)
        reference = self.reader.logprobs("reference", trajectory, temperature)
        dpo = dpo_reference = None
        if self.rewards.beta_1 != 0:
            # DPO and its reference are read at temperature 1, where DPO was trained.
            dpo = self.reader.logprobs("dpo", trajectory)
            if self.dpo_reference is not None:
                dpo_reference = self.reader.logprobs("dpo_reference", trajectory)
            elif temperature != 1.0:
                dpo_reference = self.reader.logprobs("reference", trajectory)
        values = self.reader.values("critic", trajectory)
        scores = None
        if self.reward_source is not None:
            scores = self.reader.scores(self.reward_source, trajectory, prompts)
        terms = compose_rewards(
            logprobs,
            reference,
            dpo,
            dpo_reference,
            self.score_normalizer(scores) if scores is not None else None,
            mask,
            beta_1=self.rewards.beta_1,
            beta_2=float(self.kl_coefficient),
            beta_3=self.rewards.beta_3,
            token_reward_clip=self.rewards.token_reward_clip,
            score_clip=self.rewards.score_clip,
            kl_estimator=self.rewards.kl_estimator,
            truncated=trajectory.truncated,
            truncation_penalty=self.rewards.truncation_penalty,
        )
        advantages, returns = generalized_advantages(terms.total, values, mask, self.ppo.gamma, self.ppo.lam)
        if self.ppo.whiten_advantages:
            advantages = whiten(advantages, mask)
        kl = kl_estimate(logprobs, reference, mask, "k1")
        return Experience(trajectory, logprobs, entropy, kl, values, scores, terms, advantages, returns)

    def update(self, experience: Experience, iteration: int) -> dict[str, Tensor]:
        """Epochs x minibatches x microbatches of policy and value loss.

        Args:
            experience: what `score` returned, B samples.
            iteration: enters the seed of the minibatch order; the policy waits for the critic's warm-up.

        Returns:
            Means over the optimizer steps, for the log.
        """
        samples = len(experience.mask)
        self.ppo.check(samples)
        size = self.ppo.minibatch_size or samples
        steps = [
            rows
            for epoch in range(self.ppo.epochs)
            for rows in torch.randperm(samples, generator=self._generator(iteration, epoch)).split(size)
        ]
        policy_optimizer, critic_optimizer = self.optimizers()  # type: ignore[attr-defined]
        train_policy = iteration >= self.critic.warmup_iterations
        history: list[dict[str, Tensor]] = []
        for number, rows in enumerate(steps):
            last, rows = number == len(steps) - 1, rows.to(experience.mask.device)
            metrics = accumulate_value_gradients(self.backbone, experience, rows, self.ppo, self.manual_backward)
            clip = self.ppo.critic_gradient_clip_val
            metrics["critic/gradient_norm"] = self._step(critic_optimizer, "critic", clip, last and not train_policy)
            if train_policy:
                metrics |= accumulate_policy_gradients(
                    self.backbone, experience, rows, self.ppo, self.rollout_settings.temperature, self.manual_backward
                )
                clip = self.ppo.policy_gradient_clip_val
                metrics["policy/gradient_norm"] = self._step(policy_optimizer, "policy", clip, last)
            history.append(metrics)
        for name, scheduler in self._schedulers.items():
            if name == "critic" or train_policy:
                scheduler.step()
        result = {name: torch.stack([m[name].float() for m in history]).mean() for name in history[0]}
        if train_policy:
            result["policy/ratio_deviation_first"] = history[0]["policy/ratio_deviation"]
        return result

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

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """The answers: for each prompt its row, its messages, the response text and whether it was truncated."""
        trajectory = self.rollout(batch, EVALUATION)
        return [
            {"index": int(index), "prompt": prompt, "response": text, "truncated": bool(truncated)}
            for index, prompt, text, truncated in zip(
                batch.index, batch.messages, response_texts(trajectory, self.chat), trajectory.truncated, strict=True
            )
        ]

    def role_card(self) -> RoleCard:
        """As :meth:`StageModule.role_card`, with the statistics by which scores were normalised."""
        card = super().role_card()
        if self.score_normalizer.enabled and self.score_normalizer.ready:
            card.score_mean, card.score_std = self.score_normalizer.mean_std.tolist()
        return card

    # Inside -----------------------------------------------------------------------------------------------------

    def _add_dpo(self) -> None:
        assert self.dpo is not None
        self.backbone.add_role("dpo", self.dpo)
        if self.dpo_reference is not None:
            self.backbone.add_role("dpo_reference", self.dpo_reference)
            return
        card = self.backbone.cards.get("dpo")
        if card is not None and card.kind == "adapter" and card.init_fingerprint != self.init_fingerprint:
            raise UserError(
                f"the dpo role {self.dpo} was trained against another reference than this run's; set "
                "model.backbone.init as in its DPO run, or name that reference as model.dpo_reference."
            )

    @property
    def _datamodule(self) -> Any:
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is None:
            raise UserError("RTO takes its prompts from a data module; pass one to the trainer as `datamodule`.")
        return datamodule

    def _measure_if_needed(self, dataloader: Callable[[], Iterable[PromptBatch]]) -> None:
        if self.reward_source is not None and not self.score_normalizer.ready:
            self.measure_score_statistics(dataloader())

    def _set_score_statistics(self, mean: float, std: float) -> None:
        if not self.score_normalizer.enabled:
            return
        self.score_normalizer.set(mean, std)
        critic_card = self.backbone.cards.get("critic")
        if self.critic.init == "reward" or (critic_card is not None and critic_card.role == "reward"):
            self.backbone.head("critic").rescale(mean, std)

    def _step(self, optimizer: LightningOptimizer, role: str, clip: float | None, last_of_iteration: bool) -> Tensor:
        parameters = self.backbone.trained_parameters(role)
        norm = clip_grad_norm_(parameters, clip if clip is not None else torch.inf)
        # Lightning's wrapper counts `global_step`: once an iteration.
        (optimizer if last_of_iteration else optimizer.optimizer).step()
        optimizer.zero_grad(set_to_none=True)
        return norm.detach()

    def _adapt_kl_coefficient(self, kl: float, samples: int) -> None:
        target, horizon = self.rewards.kl_target, self.rewards.kl_horizon
        if target is not None:
            adapted = adaptive_kl_coefficient(float(self.kl_coefficient), kl, target, horizon, samples)
            self.kl_coefficient.fill_(adapted)

    def _evaluate(self, batch: PromptBatch, split: str) -> None:
        trajectory = self.rollout(batch, EVALUATION)
        shown = {"reward/total", "kl"}
        for name, value in self.score(trajectory, batch.messages).metrics().items():
            if not name.startswith("value/"):  # the critic is not saved with the policy; this may be another one
                self.log(f"{split}/{name}", value.float(), prog_bar=name in shown, batch_size=len(batch))

    def _generator(self, iteration: int, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self.seed, "minibatches", iteration, epoch))
