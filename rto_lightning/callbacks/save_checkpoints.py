"""Saves what a run needs to go on, between one optimizer step and the next."""

import signal
import time
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import Strategy

from rto_lightning.errors import Stopped, UserError
from rto_lightning.parallel import largest
from rto_lightning.runs.checkpoint_files import STOPPED_EARLY, WholeCheckpointIO
from rto_lightning.runs.files import PARTIAL, link_to, remove
from rto_lightning.runs.folder import CHECKPOINTS, LAST, checkpoint_name, numbered_checkpoints, own_checkpoint
from rto_lightning.runs.limits import limits_of
from rto_lightning.runs.loops import put_between_batches
from rto_lightning.runs.signals import queue_again, stop_signals

_MARK = "batches_that_stepped"
"""Key that only these checkpoints have."""


class SaveCheckpoints(Checkpoint):
    """Saves `step=N.ckpt` and the link `last.ckpt` to it, and stops the run when a signal asks for it.

    A checkpoint is written before the first step of a run, then every so many minutes or steps, after the last step,
    and when SIGTERM or Ctrl-C ends the run. It is written before a batch, when metrics and validation of the last step
    are complete: a run that goes on from it gives every metric once and, on CPUs, the same numbers as one that was
    never interrupted. The folder is `checkpoints` in trainer.default_root_dir. A `ModelCheckpoint` beside it can keep
    more, or the best by a metric. Signals are heard by the command; a Trainer without it is stopped as Lightning does.

    Args:
        every_minutes: Minutes between two checkpoints; null for steps alone.
        every_n_train_steps: Optimizer steps (for RTO: iterations) between two checkpoints; null for minutes alone.
        keep: How many of the newest checkpoints stay.
    """

    def __init__(
        self,
        every_minutes: float | None = 10.0,
        every_n_train_steps: int | None = None,
        keep: int = 1,
    ) -> None:
        for name, value in (("every_minutes", every_minutes), ("every_n_train_steps", every_n_train_steps)):
            if value is not None and not value > 0:
                raise UserError(f"SaveCheckpoints.{name} is {value}; set it above 0, or to null.")
        if keep < 1:
            raise UserError(f"SaveCheckpoints.keep is {keep}; set it to 1 or more.")
        self.every_minutes = every_minutes
        self.every_n_train_steps = every_n_train_steps
        self.keep = keep
        self.directory = Path()
        """Where they go; known once a trainer is set up."""
        self.saved: list[Path] = []
        """The checkpoints of this run, in the order in which they were saved."""
        self._step: int | None = None
        self._time = 0.0
        self._batches_that_stepped: int | None = None
        self._off = self._saving = self._ended = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settles where checkpoints go, and how."""
        self._off = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        self.directory = Path(trainer.default_root_dir) / CHECKPOINTS
        write_whole_checkpoints(trainer.strategy)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listens to signals in the place of Lightning, which has just begun to."""
        if (signals := stop_signals()) is not None:
            signals.listen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on signals wait for the end of a step."""
        self.saved, self._step, self._time, self._ended = [], None, time.monotonic(), False
        if self._off:
            return
        self._find_older(trainer)
        if (signals := stop_signals()) is not None:
            signals.listen()
            signals.deferred = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Saves if it is time to; raises Stopped if a signal has come."""
        if self._batches_that_stepped is not None:  # Lightning takes every checkpoint for one of the end of a batch
            trainer.fit_loop.epoch_loop._batches_that_stepped = self._batches_that_stepped
            self._batches_that_stepped = None
        if self._off or batch_idx % trainer.accumulate_grad_batches:
            return
        signals = stop_signals()
        stop, due = largest(signals.requested if signals is not None else 0, int(self._is_due(trainer)))
        if due:
            self._save(trainer)
            (stop,) = largest(signals.requested if signals is not None else 0)  # one may have come in the meantime
        if stop:
            raise Stopped(stop)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the end of the run, from which a longer one can go on; raises Stopped if a signal has come."""
        self._ended = True
        if self._off:
            return
        in_an_update = (
            trainer.fit_loop.epoch_loop._should_accumulate()
        )  # of which a checkpoint would lose the gradients
        if trainer.global_step != self._step and trainer.global_step > 0 and not in_an_update:
            self._save(trainer)
        if (signals := stop_signals()) is not None:
            signals.stop_if_asked()
            signals.deferred = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves for a signal; any other exception may have come in the middle of a step."""
        if not isinstance(exception, Stopped):
            return
        if self._step is not None:
            if trainer.global_step != self._step and not self._ended:
                self._save(trainer)
            exception.saved, exception.step = str(self.saved[-1]), self._step
        if exception.number == signal.SIGUSR1 and trainer.is_global_zero:
            queue_again()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Marks a checkpoint as one of these, which stands between two batches."""
        if self._saving:
            batches = trainer.fit_loop.epoch_loop
            checkpoint[_MARK] = batches._batches_that_stepped
            if self._ended and trainer.should_stop:
                checkpoint[STOPPED_EARLY] = limits_of(trainer)
            put_between_batches(checkpoint["loops"]["fit_loop"], self._ended, batches._num_ready_batches_reached())

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes up where the checkpoint was saved."""
        self._batches_that_stepped = checkpoint.get(_MARK)
        if checkpoint.get(STOPPED_EARLY) == limits_of(trainer):
            trainer.should_stop = True  # as a callback has decided, unless the run is made longer

    def _find_older(self, trainer: Trainer) -> None:
        """Takes charge of the checkpoints of the run that goes on; those of steps it makes again go first."""
        start = own_checkpoint(self.directory.parent, trainer.ckpt_path)
        if start is None:
            return
        self.saved = [*(path for path in numbered_checkpoints(self.directory) if path.name != start.name), start]
        if self._batches_that_stepped is not None:
            self._step = trainer.global_step
        if trainer.is_global_zero:
            link_to(self.directory / LAST, start)
            for partial in self.directory.glob(f"step=*.ckpt{PARTIAL}"):
                remove(partial)  # left by a run that was killed

    def _is_due(self, trainer: Trainer) -> bool:
        if self._step is None:
            return True
        steps, minutes = trainer.global_step - self._step, (time.monotonic() - self._time) / 60
        if steps == 0:
            return False
        by_steps = self.every_n_train_steps is not None and steps >= self.every_n_train_steps
        return by_steps or (self.every_minutes is not None and minutes >= self.every_minutes)

    def _save(self, trainer: Trainer) -> None:
        path = self.directory / checkpoint_name(trainer.global_step)
        self._saving = True
        try:
            trainer.save_checkpoint(path, weights_only=False)
        finally:
            self._saving = False
        self._step, self._time = trainer.global_step, time.monotonic()
        self.saved = [*(other for other in self.saved if other != path), path]
        outdated, self.saved = self.saved[: -self.keep], self.saved[-self.keep :]
        if trainer.is_global_zero:
            link_to(self.directory / LAST, path)
            for other in outdated:
                trainer.strategy.remove_checkpoint(other)
        trainer.strategy.barrier("SaveCheckpoints")


def write_whole_checkpoints(strategy: Strategy) -> None:
    """Replaces Lightning's way to write checkpoints, unless the user has named one."""
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = WholeCheckpointIO()
