"""Stage 4: PPO on token rewards.

One `training_step` is one PPO iteration: `rollout`, `make_experience`, `update`. Each is a method of its own; the first
two can be called from a notebook, the third needs the trainer's optimizers. `global_step`, checkpoints, schedules and
loggers count iterations: of all optimizer steps of an iteration only the last goes through Lightning's wrapper, which
counts.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from rto_lightning.algorithms import adaptive_kl_coefficient, estimate_advantages, whiten
from rto_lightning.backbone import BackboneSettings, Message
from rto_lightning.data import PromptBatch
from rto_lightning.errors import UserError
from rto_lightning.modules.experience import Experience
from rto_lightning.modules.gathering import gather_rewarded
from rto_lightning.modules.numerics import IterationGuard, NumericsSettings
from rto_lightning.modules.phases import Phases
from rto_lightning.modules.ppo_update import minibatches, ppo_update
from rto_lightning.modules.rewarded_rollouts import RewardedRollouts
from rto_lightning.modules.rewarding import weigh_for_engine
from rto_lightning.modules.rto_inputs import check_training, reward_sources
from rto_lightning.modules.rto_roles import add_critic, add_policy_average, average_policy, scale_critic
from rto_lightning.modules.rto_settings import CriticSettings, PPOSettings, RewardSettings
from rto_lightning.parallel import ranks
from rto_lightning.rewards import RewardServiceSettings, WeightedReward
from rto_lightning.rollout import RolloutSettings, Trajectory
from rto_lightning.strategies import local_gradients


class RTOModule(RewardedRollouts):
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
        reward_url: Address of an HTTP reward service, or of several, in the place of the reward model.
        reward_service: How the service is asked.
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
        numerics: What happens when something is NaN or infinite.
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
        reward_url: list[str] | str | None = None,
        reward_service: RewardServiceSettings = RewardServiceSettings(),
        more_rewards: list[WeightedReward] | None = None,
        rollout: RolloutSettings = RolloutSettings(),
        rewards: RewardSettings = RewardSettings(),
        ppo: PPOSettings = PPOSettings(),
        critic: CriticSettings = CriticSettings(),
        ema_decay: float | None = None,
        policy_optimizer: OptimizerCallable = torch.optim.AdamW,
        critic_optimizer: OptimizerCallable = torch.optim.AdamW,
        policy_scheduler: LRSchedulerCallable | None = None,
        critic_scheduler: LRSchedulerCallable | None = None,
        seed: int | None = None,
        numerics: NumericsSettings = NumericsSettings(),
    ) -> None:
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise UserError(f"model.ema_decay is {ema_decay}; set it between 0 and 1, or to null.")
        first = (reward, reward_function, reward_url, reward_service)
        super().__init__(
            backbone=backbone,
            trained=trained,
            dpo=dpo,
            dpo_reference=dpo_reference,
            sources=reward_sources(*first, more_rewards or [], rewards.beta_3),
            rollout=rollout,
            rewards=rewards,
            sampling_logprobs=ppo.sampling_logprobs,
            scoring_batch_size=ppo.scoring_batch_size or 2 * ppo.microbatch_size,
            optimizer=policy_optimizer,
            lr_scheduler=policy_scheduler,
            seed=seed,
            numerics=numerics,
        )
        check_training(self.sources, rewards, ppo, critic)
        rollout.check(rewards.min_response_tokens, ppo.sampling_logprobs, ppo.importance_weight_cap)
        self.guard: IterationGuard = IterationGuard(numerics)
        self.automatic_optimization = False
        self.ppo, self.critic, self.ema_decay = ppo, critic, ema_decay
        self.critic_optimizer, self.critic_scheduler = critic_optimizer, critic_scheduler
        self.phases = Phases()
        self._schedulers: dict[str, Any] = {}
        self.last_rollout: tuple[Trajectory, list[list[Message]]]
        """This rank's responses of the last iteration and the messages of their prompts, for callbacks."""
        self.last_experience: Experience
        """The samples of all ranks in the last iteration and what they were trained on, for callbacks."""

    # Roles and optimizers --------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """As :meth:`RewardedRollouts.setup`; raises UserError also for rollouts that cannot be trained on."""
        super().setup(stage)
        if stage == "fit":
            self.ppo.check_group(self.rollout_settings.responses_per_prompt)

    def add_roles_of_task(self) -> None:
        """Add the moving average of the policy, the roles that reward, and in training the critic."""
        if self.ema_decay is not None and "policy_average" not in self.backbone.roles:
            add_policy_average(self.backbone)
        super().add_roles_of_task()
        is_training = self._trainer is None or self.trainer.training
        if is_training and self.ppo.has_critic and "critic" not in self.backbone.roles:
            add_critic(self.backbone, self.critic)
            if self.scores is not None:
                scale_critic(self.backbone, self.critic, self.scores, self.rewards.beta_3)

    @property
    def saved_role(self) -> str:
        """The policy, or its moving average."""
        return "policy_average" if "policy_average" in self.backbone.roles else "policy"

    @property
    def value_role(self) -> str | None:
        """The critic, if it is there and read off the policy's own forward."""
        return "critic" if self.critic.shared and "critic" in self.backbone.roles else None

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
        samples = self._datamodule.batch_size * self.rollout_settings.responses_per_prompt
        self.ppo.check(samples, ranks())
        self.rewards.check(samples)
        if not self.trainer.strategy.restore_checkpoint_after_setup:
            self.ensure_score_statistics()

    def on_train_start(self) -> None:
        """Measure score statistics under FSDP, which reads a checkpoint only after `on_fit_start`."""
        self.ensure_score_statistics()

    def on_validation_start(self) -> None:
        """Measure score statistics, if they are unknown; in `fit`, where a sanity check comes first, as training."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.ensure_score_statistics()
        else:
            super().on_validation_start()

    def ensure_score_statistics(self) -> None:
        """Measure score statistics on the training prompts, if neither a role nor a checkpoint brought them."""
        self.measure_if_needed(self._first_epoch, shared_out=True)

    def measure_score_statistics(self, batches: Iterable[PromptBatch], shared_out: bool = False) -> None:
        """As :meth:`RewardedRollouts.measure_score_statistics`; a critic that scores as the reward role follows."""
        assert self.scores is not None
        units_are_new = not self.scores.normalizer().ready
        super().measure_score_statistics(batches, shared_out)
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
            experience = self.make_experience(trajectory, batch.messages)
        with self.phases.phase("update", self.trainer, changes_weights=True):
            losses = self.update(experience, iteration)
            if self.ema_decay is not None:
                average_policy(self.backbone, self.ema_decay)
        self.last_rollout, self.last_experience = (trajectory, batch.messages), experience
        samples = len(experience.mask)
        metrics: dict[str, Tensor | float] = {**experience.metrics(), **losses, **self.phases.finish(samples)}
        metrics["kl_coefficient"] = float(self.kl_coefficient)
        if self.rewards.kl_target is not None and "policy/loss" in losses:  # not while the critic alone is trained
            before, aim = float(self.kl_coefficient), (self.rewards.kl_target, self.rewards.kl_horizon)
            self.kl_coefficient.fill_(adaptive_kl_coefficient(before, float(metrics["kl"]), *aim, samples))
        shown = {"reward/total", "score", "kl"}
        for name, value in metrics.items():
            self.log(f"train/{name}", value, prog_bar=name in shown, batch_size=samples)

    @torch.no_grad()
    def make_experience(self, trajectory: Trajectory, prompts: list[list[Message]]) -> Experience:
        """Rewards as `reward` gives them, and the advantages and returns that policy and critic are trained on.

        Every rank reads the responses to its own prompts; what comes out are the samples of all ranks.

        Args:
            trajectory: B prompts with a response each; responses to one prompt are neighbours.
            prompts: the messages of the prompts, for reward sources that read text.
        """
        ppo, group_size = self.ppo, self.rollout_settings.responses_per_prompt
        self.guard.prompts = prompts
        policy = self.reader.policy("policy", trajectory, self.read_temperature, self.value_role)
        rewarded = self.reward_of(trajectory, policy, prompts)
        values = policy.values
        if ppo.has_critic and values is None:
            values = self.reader.values("critic", trajectory)
        rewarded, values = gather_rewarded(rewarded, values)
        advantages, returns = estimate_advantages(
            ppo.estimator, rewarded.terms, rewarded.mask, ppo.gamma, ppo.lam, values, group_size
        )
        if ppo.whitens:
            advantages = whiten(advantages, rewarded.mask)
        advantages = weigh_for_engine(advantages, rewarded, ppo.importance_weight_cap)
        return Experience(**vars(rewarded), values=values, advantages=advantages, returns=returns)

    def update(self, experience: Experience, iteration: int) -> dict[str, Tensor]:
        """Epochs x minibatches x microbatches of policy and value loss.

        Args:
            experience: what `make_experience` returned, B samples; of each minibatch every rank trains on a share.
            iteration: enters the seed of the minibatch order; the policy waits for the critic's warm-up.

        Returns:
            Means over the minibatches, for the log.
        """
        self.ppo.check(samples := len(experience.mask), ranks())
        optimizers = self.optimizers()
        policy, critic = optimizers if isinstance(optimizers, list) else (optimizers, None)
        train_policy = critic is None or iteration >= self.critic.warmup_iterations
        passes = self.guard.experience_passes(self, experience)
        with local_gradients(self.trainer.strategy):
            metrics = ppo_update(
                self.backbone,
                experience,
                minibatches(samples, self.ppo, self.seed, iteration) if passes else (),
                self.ppo,
                self.rollout_settings.temperature,
                self.manual_backward,
                policy if train_policy else None,
                critic,
                partial(self.guard.step_passes, self, experience),
                self.critic.value_coefficient if critic is not None and self.critic.shared else None,
            )
        self.log_skipped_steps()
        for name, scheduler in self._schedulers.items():
            if name == "critic" or train_policy:
                scheduler.step()
        return metrics

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Plain: the losses of policy and critic each run it within their own role."""
        loss.backward(*args, **kwargs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that lacks the moving average which the settings ask for, by a UserError."""
        super().on_load_checkpoint(checkpoint)
        if self.ema_decay is not None and not any("policy_average" in name for name in checkpoint["state_dict"]):
            raise UserError("the checkpoint holds no moving average of the policy; set model.ema_decay to null.")
