"""Stage 1, optional: supervised fine-tuning on demonstrations."""

from torch import Tensor

from rto_lightning.algorithms import masked_mean
from rto_lightning.data import DemonstrationBatch
from rto_lightning.modules.stage import StageModule
from rto_lightning.parallel import ranks, sum_over_ranks


class SFTModule(StageModule):
    """Maximum likelihood of the demonstrated responses; the loss is the mean over response tokens, in nats."""

    stage_name = "sft"

    def training_step(self, batch: DemonstrationBatch, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        loss, logprobs = self._loss(batch, "train")
        return self.guarded(loss, batch, {"the policy's log-probabilities": logprobs})

    def validation_step(self, batch: DemonstrationBatch, batch_idx: int) -> None:
        """Loss on held-out demonstrations."""
        self._loss(batch, "validation")

    def test_step(self, batch: DemonstrationBatch, batch_idx: int) -> None:
        """Loss on test demonstrations."""
        self._loss(batch, "test")

    def _loss(self, batch: DemonstrationBatch, split: str) -> tuple[Tensor, Tensor]:
        """The loss and the log-probability of each response token, (B, T)."""
        mask = batch.sequences.response_mask
        logprobs, _ = self.backbone.token_logprobs(self.trained_role, batch.sequences)
        loss, tokens = -masked_mean(logprobs, mask), mask.sum()
        all_tokens = sum_over_ranks(tokens)
        if ranks() > 1:  # so that the mean over ranks is that over all tokens
            loss = loss * tokens * ranks() / all_tokens
        # Weighted by tokens, the mean over an epoch does not depend on the batch size.
        self.log_mean(f"{split}/loss", loss, int(all_tokens), shown=True)
        return loss, logprobs
