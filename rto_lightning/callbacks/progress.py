"""A progress bar that also shows the phases inside one step."""

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

SECONDS_BETWEEN_LINES = 10.0
"""How often the bar is written where it cannot be redrawn in place (a file, a pipe)."""


class PhaseProgressBar(TQDMProgressBar):
    """Lightning's bar with the iteration, its phase and samples per second.

    A step of RTO is a whole iteration: a rollout, scoring and many updates. The module says where it is by
    `show_phase`; from then on the bar counts iterations instead of the batches of an epoch. Stages that never
    call it get the usual bar.

    Args:
        refresh_rate: How many batches pass between two updates of the bar; 0 hides it.
    """

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._phase: str | None = None
        self._samples_per_second: float | None = None
        self._last_line = float("-inf")

    def show_phase(self, name: str, samples_per_second: float | None = None) -> None:
        """Shows what the current iteration is doing.

        Args:
            name: The phase that begins: `rollout`, `scoring` or `update`.
            samples_per_second: Speed of the last iteration, if it is known.
        """
        self._phase = name
        if samples_per_second is not None:
            self._samples_per_second = samples_per_second
        bar = self._train_progress_bar
        if bar is None or bar.disable:
            return
        bar.total, bar.n = self._iterations(), self.trainer.global_step
        bar.set_description(self._description(), refresh=False)
        if self._in_place(bar):
            bar.set_postfix(self.get_metrics(self.trainer, self.trainer.lightning_module))

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """The bar's figures: samples per second first, no version number, `train/` left out of the names."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        tidy: dict[str, Any] = {}
        if self._samples_per_second is not None:
            tidy["samples/s"] = float(f"{self._samples_per_second:.3g}")
        for name, value in metrics.items():
            short = name.removeprefix("train/")
            tidy[name if short in tidy else short] = value
        return tidy

    def on_train_start(self, *args: Any) -> None:
        """Begins a run with no phase known."""
        self._phase = self._samples_per_second = None
        super().on_train_start(*args)

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        """Begins an epoch's bar, or goes on with the iterations where phases are shown."""
        if self._phase is None:
            super().on_train_epoch_start(trainer, *args)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advances by one batch or, where phases are shown, by one iteration."""
        if self._phase is None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            return
        bar = self.train_progress_bar
        bar.total, bar.n = self._iterations(), trainer.global_step
        if not bar.disable and self._should_update(trainer.global_step, bar.total):
            bar.set_postfix(self.get_metrics(trainer, pl_module))

    def _should_update(self, current: int, total: int) -> bool:
        if not super()._should_update(current, total):
            return False
        return sys.stdout.isatty() or current == total or self._line_is_due()

    def _in_place(self, bar: Tqdm) -> bool:
        """Whether the bar may be redrawn now for a phase alone."""
        return bool(sys.stdout.isatty()) and not bar.disable

    def _line_is_due(self) -> bool:
        now = time.monotonic()
        if now - self._last_line < SECONDS_BETWEEN_LINES:
            return False
        self._last_line = now
        return True

    def _iterations(self) -> int | None:
        """Iterations of the whole run; None when the run has no end."""
        total = self.trainer.estimated_stepping_batches
        return None if total == float("inf") else int(total)

    def _description(self) -> str:
        total = self._iterations()
        number = self.trainer.global_step + 1
        return f"Iteration {number}/{total or '?'} {self._phase}"
