"""What the callbacks that watch RTO's iterations have in common."""

from lightning.pytorch import Callback, LightningModule, Trainer

from rto_lightning.errors import UserError


def check_every(callback: Callback, every_n_iterations: int) -> int:
    """The number of iterations between two times; raises UserError if it is below 1."""
    if every_n_iterations < 1:
        name = type(callback).__name__
        raise UserError(f"{name}.every_n_iterations is {every_n_iterations}; set it to 1 or more.")
    return every_n_iterations


class RolloutCallback(Callback):
    """Watches the rollouts of RTO."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a stage without rollouts.

        Raises:
            UserError: for every stage but RTO.
        """
        stage = getattr(pl_module, "stage_name", None)
        if stage != "rto":
            raise UserError(
                f"{type(self).__name__} watches rollouts, and the {stage} stage has none; remove it from "
                "trainer.callbacks."
            )
