"""How much reward RTO has bought for how much KL."""

import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from rto_lightning.callbacks.iterations import RolloutCallback, check_every
from rto_lightning.callbacks.media import log_figure, takes_pictures
from rto_lightning.report.charts import Point, frontier_figure


class LogFrontier(RolloutCallback):
    """Draws score against KL from the reference, a point an iteration, for TensorBoard and Weights & Biases.

    Without a score it is the sum of all reward terms. Of two runs the one whose line is higher at the same KL has made
    more of how far it has moved.

    Args:
        every_n_iterations: Iterations between two pictures.

    Raises:
        UserError: if it is below 1.
    """

    def __init__(self, every_n_iterations: int = 10) -> None:
        self.every_n_iterations = check_every(self, every_n_iterations)
        self.points: list[Point] = []
        """KL (nats a response) and reward of each iteration so far."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Take note of the iteration, and draw if it is time to."""
        metrics = trainer.callback_metrics
        reward = "train/score" if "train/score" in metrics else "train/reward/total"
        point = float(metrics["train/kl"]), float(metrics[reward])
        if all(map(math.isfinite, point)):  # not of a step that was skipped
            self.points.append(point)
        if (trainer.global_step - 1) % self.every_n_iterations == 0:
            self._draw(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the whole run."""
        if trainer.global_step > 0 and (trainer.global_step - 1) % self.every_n_iterations:
            self._draw(trainer)

    def _draw(self, trainer: Trainer) -> None:
        if self.points and trainer.is_global_zero and takes_pictures(trainer):
            label = "score" if "train/score" in trainer.callback_metrics else "total reward"
            log_figure(trainer, "frontier", frontier_figure({"": self.points}, label), trainer.global_step - 1)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"points": [list(point) for point in self.points]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with the iterations before the checkpoint."""
        self.points = [(kl, reward) for kl, reward in state_dict["points"]]
