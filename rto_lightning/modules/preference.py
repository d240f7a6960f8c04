"""Stage 2: direct preference optimization. Its policy carries the token rewards of RTO."""

from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from rto_lightning.algorithms import PreferenceLoss, dpo_loss, ipo_loss, masked_sum
from rto_lightning.backbone import BackboneSettings
from rto_lightning.data import PreferenceBatch
from rto_lightning.errors import UserError
from rto_lightning.evaluation import PairRecords, ranking_accuracies
from rto_lightning.modules.stage import StageModule


class PreferenceModule(StageModule):
    """DPO, conservative DPO (`label_smoothing`) or IPO against the frozen reference.

    `test` reports how often the implicit reward ranks the chosen answer higher, with an interval clustered by prompt,
    beside the baselines "the longer answer" and "the answer that the untrained reference finds likelier".

    Args:
        backbone: The base model and its adapters.
        trained: Saved DPO role to test or to train further.
        loss: `dpo` (arXiv 2305.18290) or `ipo` (arXiv 2310.12036).
        beta: Strength of the KL constraint; the implicit reward is beta * log(policy / reference).
        label_smoothing: Probability that a label is wrong (conservative DPO); only with `dpo`.
        optimizer: Optimizer of the policy.
        lr_scheduler: Learning-rate schedule, stepped after each optimizer step.
    """

    stage_name = "dpo"
    saved_as = "dpo"

    def __init__(
        self,
        backbone: BackboneSettings,
        trained: str | None = None,
        loss: Literal["dpo", "ipo"] = "dpo",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(backbone, trained, optimizer, lr_scheduler)
        if beta <= 0:
            raise UserError(f"beta is {beta}, with which nothing is learned; set it above 0.")
        if label_smoothing != 0 and loss != "dpo":
            raise UserError(f"label_smoothing belongs to DPO and does not go with loss {loss}; set it to 0.")
        if not 0 <= label_smoothing < 0.5:
            raise UserError(f"label_smoothing is {label_smoothing}; set it to at least 0 and below 0.5.")
        self.loss = loss
        self.beta = beta
        self.label_smoothing = label_smoothing

    def add_roles(self) -> None:
        """Add the frozen reference and the policy that starts as it."""
        self.add_reference()
        self.add_policy()

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """Loss of one batch of pairs."""
        loss, _ = self._compare(batch, "train")
        return loss

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Loss and accuracy on held-out pairs."""
        self._compare(batch, "validation")

    def on_test_epoch_start(self) -> None:
        """Forget the pairs of an earlier test."""
        self.pair_records = PairRecords()

    def test_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Collect what ranks each pair: implicit reward, length, likelihood under the reference."""
        _, summed = self._compare(batch, "test")
        self.pair_records.add(
            cluster=batch.cluster,
            characters=batch.characters,
            scores={
                "dpo_reward": self.beta * (summed["policy"] - summed["reference"]),
                "longer_answer": batch.characters,
                "reference_logprob": summed["reference"],
                "reference_logprob_per_token": summed["reference"] / batch.sequences.response_lengths,
            },
        )

    def on_test_epoch_end(self) -> None:
        """Log accuracies with their intervals, over all pairs and over those of like length."""
        self.log_dict({f"test/{name}": value for name, value in ranking_accuracies(self.pair_records).items()})

    def role_settings(self) -> dict[str, Any]:
        """Loss and beta: token rewards are read in their units."""
        return {"loss": self.loss, "beta": self.beta, "label_smoothing": self.label_smoothing}

    def _compare(self, batch: PreferenceBatch, split: str) -> tuple[Tensor, dict[str, Tensor]]:
        mask = batch.sequences.response_mask
        with torch.no_grad():
            reference_logprobs, _ = self.backbone.token_logprobs("reference", batch.sequences)
        policy_logprobs, _ = self.backbone.token_logprobs(self.trained_role, batch.sequences)
        policy, reference = masked_sum(policy_logprobs, mask, dim=1), masked_sum(reference_logprobs, mask, dim=1)
        result = self._preference_loss(policy, reference)
        loss = result.losses.mean()
        margins = result.chosen_rewards - result.rejected_rewards
        pairs = len(batch)
        metrics = {
            "loss": loss,
            "accuracy": (margins > 0).float().mean() + 0.5 * (margins == 0).float().mean(),
            "margin": margins.mean(),
            "reward_chosen": result.chosen_rewards.mean(),
            "reward_rejected": result.rejected_rewards.mean(),
            "logprob_chosen": policy[:pairs].mean(),
            "logprob_rejected": policy[pairs:].mean(),
            "length_chosen": batch.sequences.response_lengths[:pairs].float().mean(),
            "length_rejected": batch.sequences.response_lengths[pairs:].float().mean(),
        }
        shown = {"loss", "accuracy"}
        for name, value in metrics.items():
            self.log(f"{split}/{name}", value.detach(), prog_bar=name in shown, batch_size=pairs)
        return loss, {"policy": policy.detach(), "reference": reference}

    def _preference_loss(self, policy: Tensor, reference: Tensor) -> PreferenceLoss:
        policy_chosen, policy_rejected = policy.chunk(2)
        reference_chosen, reference_rejected = reference.chunk(2)
        if self.loss == "ipo":
            return ipo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, self.beta)
        return dpo_loss(
            policy_chosen, policy_rejected, reference_chosen, reference_rejected, self.beta, self.label_smoothing
        )
