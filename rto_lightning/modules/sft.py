"""Stage 1, optional: supervised fine-tuning on demonstrations."""

from torch import Tensor

from rto_lightning.algorithms import masked_mean
from rto_lightning.data import DemonstrationBatch
from rto_lightning.modules.stage import StageModule


class SFTModule(StageModule):
    """Maximum likelihood of the demonstrated responses; the loss is the mean over response tokens, in nats."""

    def training_step(self, batch: DemonstrationBatch, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        return self._loss(batch, "train")

    def validation_step(self, batch: DemonstrationBatch, batch_idx: int) -> None:
        """Loss on held-out demonstrations."""
        self._loss(batch, "validation")

    def test_step(self, batch: DemonstrationBatch, batch_idx: int) -> None:
        """Loss on test demonstrations."""
        self._loss(batch, "test")

    def _loss(self, batch: DemonstrationBatch, split: str) -> Tensor:
        logprobs, _ = self.backbone.token_logprobs(self.trained_role, batch.sequences)
        loss = -masked_mean(logprobs, batch.sequences.response_mask)
        # Weighted by tokens, the mean over an epoch does not depend on the batch size.
        tokens = int(batch.sequences.response_mask.sum())
        self.log(f"{split}/loss", loss, prog_bar=True, batch_size=tokens)
        return loss
