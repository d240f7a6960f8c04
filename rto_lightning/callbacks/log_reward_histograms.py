"""How the terms of RTO's reward are distributed."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from rto_lightning.callbacks.iterations import RolloutCallback, check_every
from rto_lightning.callbacks.media import log_histogram, takes_pictures
from rto_lightning.modules import RTOModule


class LogRewardHistograms(RolloutCallback):
    """Logs histograms of each reward term to TensorBoard and Weights & Biases.

    `histogram/reward/token` and `histogram/reward/kl` count tokens, `histogram/reward/score` and
    `histogram/reward/total` responses.

    Args:
        every_n_iterations: Iterations between two histograms.

    Raises:
        UserError: if it is below 1.
    """

    def __init__(self, every_n_iterations: int = 10) -> None:
        self.every_n_iterations = check_every(self, every_n_iterations)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Log the rewards of the iteration that has ended, if it is time to."""
        iteration = trainer.global_step - 1
        if iteration % self.every_n_iterations or not trainer.is_global_zero or not takes_pictures(trainer):
            return
        assert isinstance(pl_module, RTOModule)
        terms, mask = pl_module.last_experience.terms, pl_module.last_experience.mask
        of_responses = {name: getattr(terms, name).where(mask, 0.0).sum(1) for name in ("score", "total")}
        values = {"token": terms.token[mask], "kl": terms.kl[mask], **of_responses}
        for name, numbers in values.items():
            log_histogram(trainer, f"histogram/reward/{name}", numbers, iteration)
