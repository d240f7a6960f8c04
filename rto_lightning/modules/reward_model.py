"""Stage 3: the reward model, one score for a whole answer."""

from dataclasses import dataclass

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from rto_lightning.algorithms import bradley_terry_loss, pair_accuracy
from rto_lightning.backbone import BackboneSettings, RoleCard
from rto_lightning.data import PreferenceBatch
from rto_lightning.errors import UserError, check_settings
from rto_lightning.modules.numerics import NumericsSettings
from rto_lightning.modules.score_statistics import collect_scores
from rto_lightning.modules.stage import StageModule
from rto_lightning.parallel import gather_rows
from rto_lightning.rewards import score_statistics
from rto_lightning.rollout import RolloutSettings, Trajectory, TransformersEngine, sample_seeds
from rto_lightning.seeding import run_seed


@dataclass(frozen=True)
class ScoreStatisticsSettings:
    """How mean and standard deviation of the scores are measured when training ends."""

    samples: int = 256
    """Answers of the reference policy to score; 0 measures nothing and leaves it to RTO."""
    max_new_tokens: int = 256
    """Length limit of those answers; take that of the RTO stage."""

    def __post_init__(self) -> None:
        """Raise UserError for values that no run can use."""
        check_settings("model.score_statistics", self, positive=("max_new_tokens",), not_negative=("samples",))


class RewardModelModule(StageModule):
    """Bradley-Terry reward model: a scalar head at the last token, on an adapter (or copy) of the base model.

    When training ends, answers of the reference policy are scored and the mean and standard deviation saved with the
    role, so that RTO can normalise scores the same way in every run.

    Args:
        backbone: The base model and its adapters.
        trained: Saved reward role to test or to train further.
        score_statistics: How the normalisation is measured.
        optimizer: Optimizer of the reward model.
        lr_scheduler: Learning-rate schedule, stepped after each optimizer step.
        numerics: What happens when something is NaN or infinite.
    """

    stage_name = "reward_model"
    trained_role = "reward"
    saved_as = "reward"

    def __init__(
        self,
        backbone: BackboneSettings,
        trained: str | None = None,
        score_statistics: ScoreStatisticsSettings = ScoreStatisticsSettings(),
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        numerics: NumericsSettings = NumericsSettings(),
    ) -> None:
        super().__init__(backbone, trained, optimizer, lr_scheduler, numerics)
        self.score_statistics = score_statistics
        self.register_buffer("score_mean_std", torch.full((2,), torch.nan))
        self.score_mean_std: Tensor
        self._training_has_ended = False

    def add_roles(self) -> None:
        """Add the reward role, with a scalar head."""
        self.add_policy(scalar_head=True)

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """Loss of one batch of pairs."""
        loss, scores = self._compare(batch, "train")
        return self.guarded(loss, batch, {"the scores": scores})

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Loss and accuracy on held-out pairs."""
        self._compare(batch, "validation")

    def test_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Loss and accuracy on test pairs."""
        self._compare(batch, "test")

    @torch.no_grad()
    def on_train_end(self) -> None:
        """Measure mean and standard deviation of the scores on answers of the reference policy."""
        self._training_has_ended = True
        wanted = self.score_statistics.samples
        if wanted == 0 or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if "reference" not in self.backbone.roles:
            self.add_reference()
            self.shard_roles()
        self.trainer.strategy.model_to_device()
        engine = TransformersEngine(self.backbone, RolloutSettings(self.score_statistics.max_new_tokens))

        def score(batch: PreferenceBatch) -> Tensor:
            return gather_rows(self._score_reference_answers(batch.to(self.device), engine))

        try:
            scores = collect_scores(self._first_epoch(), score, wanted, self.guard.settings)
            self.score_mean_std.copy_(score_statistics(scores, "the reward model"))
        except UserError as error:  # the trained role is worth more than its statistics
            rank_zero_warn(f"{error} It is saved without score statistics.")

    def finish(self) -> None:
        """Measure them now in a run that goes on after its last step, for which Lightning ends no training."""
        if not self._training_has_ended:
            self.on_train_end()

    def role_card(self) -> RoleCard:
        """As :meth:`StageModule.role_card`, with mean and standard deviation of the scores."""
        card = super().role_card()
        if self.score_mean_std.isfinite().all():
            card.score_mean, card.score_std = self.score_mean_std.tolist()
        return card

    def _score_reference_answers(self, batch: PreferenceBatch, engine: TransformersEngine) -> Tensor:
        pairs, width = len(batch), batch.sequences.prompt_width
        prompts = batch.sequences.rows(slice(0, pairs))
        trajectory: Trajectory = engine.rollout(
            "reference",
            prompts.input_ids[:, :width],
            prompts.attention_mask[:, :width],
            sample_seeds(run_seed(None), 0, batch.index),
        )
        return self.backbone.sequence_scores(self.trained_role, trajectory.sequences).float()

    def _compare(self, batch: PreferenceBatch, split: str) -> tuple[Tensor, Tensor]:
        """The loss, and the scores of chosen and rejected answers, (2B,)."""
        scores = self.backbone.sequence_scores(self.trained_role, batch.sequences)
        chosen, rejected = scores.chunk(2)
        loss = bradley_terry_loss(chosen, rejected).mean()
        metrics = {
            "loss": loss,
            "accuracy": pair_accuracy(chosen, rejected).mean(),
            "margin": (chosen - rejected).mean(),
            "score_chosen": chosen.mean(),
            "score_rejected": rejected.mean(),
        }
        for name, value in metrics.items():
            self.log_mean(f"{split}/{name}", value, len(batch), shown=name in {"loss", "accuracy"})
        return loss, scores
