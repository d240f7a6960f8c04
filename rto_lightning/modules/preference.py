"""Stage 2: direct preference learning. Its policy carries the token rewards of RTO."""

import math
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from rto_lightning.algorithms import (
    PairRecords,
    PreferenceLoss,
    dpo_loss,
    ipo_loss,
    masked_sum,
    pair_accuracy,
    ranking_accuracies,
    rdpo_loss,
    simpo_loss,
    tdpo1_loss,
    tdpo2_loss,
)
from rto_lightning.backbone import BackboneSettings
from rto_lightning.data import PreferenceBatch
from rto_lightning.errors import UserError
from rto_lightning.modules.numerics import NumericsSettings
from rto_lightning.modules.pair_logprobs import PairLogprobs
from rto_lightning.modules.reference_cache import cached_reference, check_cacheable
from rto_lightning.modules.stage import StageModule

BETA = 0.1
SIMPO_BETA = 2.5
OWN_SETTINGS = {"dpo": "label_smoothing", "rdpo": "length_coefficient", "simpo": "margin", "tdpo2": "kl_coefficient"}
"""The setting that only this loss has; the others leave it at its default."""


@dataclass(frozen=True)
class Answers:
    """What the losses read of the chosen, then of the rejected answers of a batch, (2B,) each."""

    policy: Tensor
    """Log-probability under the policy, summed over tokens."""
    reference: Tensor | None
    """The same under the reference; None where no reference is read."""
    kl: Tensor | None
    """KL(reference || policy), summed over positions; None for losses without it."""
    lengths: Tensor
    """Number of tokens, int64."""


class PreferenceModule(StageModule):
    """Direct preference learning: DPO, conservative DPO (`label_smoothing`), IPO, R-DPO, SimPO, TDPO1 or TDPO2.

    The reference is the base model or the SFT adapter `init` on it; `simpo` reads it in `test` only. Whatever the loss,
    RTO can take the trained role as its `dpo` role: a token's reward is log(policy / reference).

    `test` reports how often the implicit reward ranks the chosen answer higher, with an interval clustered by prompt,
    beside the baselines "the longer answer" and "the answer that the untrained reference finds likelier". `dpo_reward`
    is beta * log(policy / reference), whose parts are RTO's token rewards; `implicit_reward` is that of the loss where
    it is another one (`rdpo`, `simpo`, `tdpo1`, `tdpo2`).

    Args:
        backbone: The base model and its adapters.
        trained: Saved DPO role to test or to train further.
        loss: `dpo` (arXiv 2305.18290), `ipo` (2310.12036), `rdpo` (length-regularized, 2403.19159), `simpo` (mean
            log-probability of a token, no reference, 2405.14734), `tdpo1` or `tdpo2` (with the KL divergence at each
            position, 2404.11999).
        beta: Scale of the implicit reward beta * log(policy / reference), the strength of the KL constraint; with
            `simpo` of beta * log(policy) / length. Null is 0.1, with `simpo` 2.5.
        label_smoothing: Probability that a label is wrong (conservative DPO); only with `dpo`.
        length_coefficient: Reward that each token of an answer costs, R-DPO's alpha; only with `rdpo`.
        margin: How much higher the chosen reward shall be, SimPO's gamma, not divided by beta; only with `simpo`.
        kl_coefficient: Weight of the KL divergence at each position, TDPO2's alpha; only with `tdpo2`.
        reference_cache: Folder that keeps the reference's log-probabilities of every pair. They are computed once,
            before the first step, and read from there in each epoch and in later runs of the same model, data and
            settings; in mode `full` no reference is held in memory while training. Null computes them in each step. Not
            with `tdpo1` and `tdpo2`.
        optimizer: Optimizer of the policy.
        lr_scheduler: Learning-rate schedule, stepped after each optimizer step.
        numerics: What happens when something is NaN or infinite.
    """

    stage_name = "dpo"
    saved_as = "dpo"

    def __init__(
        self,
        backbone: BackboneSettings,
        trained: str | None = None,
        loss: Literal["dpo", "ipo", "rdpo", "simpo", "tdpo1", "tdpo2"] = "dpo",
        beta: float | None = None,
        label_smoothing: float = 0.0,
        length_coefficient: float = 0.001,
        margin: float = 0.5,
        kl_coefficient: float = 0.2,
        reference_cache: str | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        numerics: NumericsSettings = NumericsSettings(),
    ) -> None:
        super().__init__(backbone, trained, optimizer, lr_scheduler, numerics)
        self.loss = loss
        self.beta = (SIMPO_BETA if loss == "simpo" else BETA) if beta is None else beta
        self.label_smoothing = label_smoothing
        self.length_coefficient = length_coefficient
        self.margin = margin
        self.kl_coefficient = kl_coefficient
        self.reference_cache = reference_cache
        self._references: dict[str, PairLogprobs] = {}
        """The reference's log-probabilities of each split of the running task, where they are cached."""
        self._check_settings()

    def setup(self, stage: str) -> None:
        """As :meth:`StageModule.setup`; also refuses a `reference_cache` where there can be none, and to test there.

        Raises:
            UserError: for either.
        """
        super().setup(stage)
        if stage == "test" and self.trainer.world_size > 1:
            raise UserError("test ranks all pairs in one process; set trainer.devices to 1.")
        self._references = {}  # of an earlier task, which may have broken off
        if self._caches_reference:
            check_cacheable(self.trainer)

    def add_roles_of_task(self) -> None:
        """Add the frozen reference that the policy starts as, where it is read."""
        testing = self._trainer is not None and self.trainer.testing
        # On the shared base a reference costs nothing; a copy of the model is loaded for the cache and dropped again.
        held = self.settings.mode == "adapters" or not self._caches_reference
        if held and (self.loss != "simpo" or testing) and "reference" not in self.backbone.roles:
            self.add_reference()

    def on_fit_start(self) -> None:
        """Read or compute the cached log-probabilities of the training and validation pairs."""
        if self.loss != "simpo":
            self._cache_reference("train", "validation")

    def on_validation_start(self) -> None:
        """The same of the validation pairs, unless training has read them."""
        if self.loss != "simpo" and "validation" not in self._references:
            self._cache_reference("validation")

    def on_test_start(self) -> None:
        """The same of the test pairs."""
        self._cache_reference("test")

    def teardown(self, stage: str) -> None:
        """Forget cached log-probabilities: the next task may have other data."""
        self._references = {}

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """Loss of one batch of pairs."""
        loss, answers, _ = self._compare(batch, "train")
        read = {
            "the policy's log-probabilities": answers.policy,
            "the reference's log-probabilities": answers.reference,
            "the KL divergence": answers.kl,
        }
        return self.guarded(loss, batch, {name: tensor for name, tensor in read.items() if tensor is not None})

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Loss and accuracy on held-out pairs."""
        self._compare(batch, "validation")

    def on_test_epoch_start(self) -> None:
        """Forget the pairs of an earlier test."""
        self.pair_records = PairRecords()

    def test_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Collect what ranks each pair: implicit reward, length, likelihood under the reference."""
        _, answers, result = self._compare(batch, "test")
        assert answers.reference is not None
        scores = {
            "dpo_reward": self.beta * (answers.policy.detach() - answers.reference),
            "longer_answer": batch.characters,
            "reference_logprob": answers.reference,
            "reference_logprob_per_token": answers.reference / answers.lengths,
        }
        if self.loss not in ("dpo", "ipo"):
            scores["implicit_reward"] = torch.cat([result.chosen_rewards, result.rejected_rewards])
        self.pair_records.add(cluster=batch.cluster, characters=batch.characters, scores=scores)

    def on_test_epoch_end(self) -> None:
        """Log accuracies with their intervals, over all pairs and over those of like length."""
        self.log_dict({f"test/{name}": value for name, value in ranking_accuracies(self.pair_records).items()})

    def role_settings(self) -> dict[str, Any]:
        """Loss, beta and the loss's own setting: they say in which units the policy left its reference."""
        settings: dict[str, Any] = {"loss": self.loss, "beta": self.beta}
        if self.loss in OWN_SETTINGS:
            settings[OWN_SETTINGS[self.loss]] = getattr(self, OWN_SETTINGS[self.loss])
        return settings

    def preference_loss(self, answers: Answers) -> PreferenceLoss:
        """The loss and the implicit rewards of B pairs, for a subclass to replace.

        Args:
            answers: what the roles say of the 2B answers, B chosen ones and then B rejected ones. `reference` is None
                where `simpo` trains, and `kl` is there for `tdpo1` and `tdpo2` alone.
        """
        if self.loss == "simpo":
            return simpo_loss(*_pair(answers.policy / answers.lengths), self.beta, self.margin)
        assert answers.reference is not None
        logprobs = (*_pair(answers.policy), *_pair(answers.reference))
        if self.loss == "dpo":
            return dpo_loss(*logprobs, self.beta, self.label_smoothing)
        if self.loss == "ipo":
            return ipo_loss(*logprobs, self.beta)
        if self.loss == "rdpo":
            return rdpo_loss(*logprobs, *_pair(answers.lengths), self.beta, self.length_coefficient)
        assert answers.kl is not None
        if self.loss == "tdpo1":
            return tdpo1_loss(*logprobs, *_pair(answers.kl), self.beta)
        return tdpo2_loss(*logprobs, *_pair(answers.kl), self.beta, self.kl_coefficient)

    # Inside -----------------------------------------------------------------------------------------------------

    def _check_settings(self) -> None:
        if not 0 < self.beta < math.inf:
            raise UserError(f"beta is {self.beta}, with which nothing is learned; set it to a finite number above 0.")
        for loss, name in OWN_SETTINGS.items():
            value, default = getattr(self, name), signature(PreferenceModule).parameters[name].default
            if value != default and self.loss != loss:
                raise UserError(
                    f"{name} belongs to loss {loss} and does not go with loss {self.loss}; leave it at {default}."
                )
            if not 0 <= value < math.inf:
                raise UserError(f"{name} is {value}; set it to a finite number that is not negative.")
        if self.label_smoothing >= 0.5:
            raise UserError(f"label_smoothing is {self.label_smoothing}; set it to at least 0 and below 0.5.")
        if self.reference_cache is not None and self.loss in ("tdpo1", "tdpo2"):
            raise UserError(
                f"reference_cache does not go with loss {self.loss}, which reads the reference's log-probabilities of "
                "the whole vocabulary, too many to keep; set it to null."
            )

    @property
    def _caches_reference(self) -> bool:
        """Not in `fast_dev_run`, whose one batch is not worth reading all pairs; nor without a trainer."""
        running = self._trainer is not None and not self.trainer.fast_dev_run  # type: ignore[attr-defined]
        return running and self.reference_cache is not None

    def _cache_reference(self, *splits: str) -> None:
        if self._caches_reference:
            assert self.reference_cache is not None
            self._references |= cached_reference(self, self.reference_cache, splits)

    def _compare(self, batch: PreferenceBatch, split: str) -> tuple[Tensor, Answers, PreferenceLoss]:
        answers = self._read(batch, split)
        result = self.preference_loss(answers)
        loss = result.losses.mean()
        margins = result.chosen_rewards - result.rejected_rewards
        metrics = {
            "loss": loss,
            "accuracy": pair_accuracy(result.chosen_rewards, result.rejected_rewards).mean(),
            "margin": margins.mean(),
            "reward_chosen": result.chosen_rewards.mean(),
            "reward_rejected": result.rejected_rewards.mean(),
        }
        for name, sums in (("logprob", answers.policy), ("length", answers.lengths.float()), ("kl", answers.kl)):
            if sums is not None:
                chosen, rejected = _pair(sums)
                metrics |= {f"{name}_chosen": chosen.mean(), f"{name}_rejected": rejected.mean()}
        shown = {"loss", "accuracy"}
        for name, value in metrics.items():
            self.log_mean(f"{split}/{name}", value, len(batch), shown=name in shown)
        return loss, answers, result

    def _read(self, batch: PreferenceBatch, split: str) -> Answers:
        sequences, mask = batch.sequences, batch.sequences.response_mask
        kl: Tensor | None = None
        reference: Tensor | None = None
        if self.loss in ("tdpo1", "tdpo2"):
            policy, reference, kl = self.backbone.token_divergence(self.trained_role, "reference", sequences)
        else:
            if split in self._references:
                reference = self._references[split].of(batch)
            elif self.loss != "simpo" or split == "test":
                with torch.no_grad():
                    reference, _ = self.backbone.token_logprobs("reference", sequences)
            policy, _ = self.backbone.token_logprobs(self.trained_role, sequences)
        return Answers(
            policy=masked_sum(policy, mask, dim=1),
            reference=None if reference is None else masked_sum(reference, mask, dim=1),
            kl=None if kl is None else masked_sum(kl, mask, dim=1),
            lengths=sequences.response_lengths,
        )


def _pair(values: Tensor) -> tuple[Tensor, Tensor]:
    """Those of the chosen and those of the rejected answers, (B,) each."""
    chosen, rejected = values.chunk(2)
    return chosen, rejected
