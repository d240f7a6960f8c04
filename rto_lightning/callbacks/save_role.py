"""Writes the trained role when training has ended."""

import shutil
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from rto_lightning.runs.files import PARTIAL, check_room


class SaveRole(Callback):
    """Saves what a stage has trained as a role that later stages load.

    The role is written beside its place and then moved there, so that a folder of that name is always a whole
    role. An exception or an interruption ends training before this callback is asked, and leaves no role.

    Args:
        directory: Where the role goes.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calls `finish` and `save_role` of the module on every rank, of which rank zero writes.

        Raises:
            UserError: if there is no room for the role.
        """
        if trainer.global_step == 0:
            rank_zero_warn("Training made no step (no batches, or max_steps 0): no role is saved.")
            return
        pl_module.finish()  # type: ignore[operator]  # every StageModule has it, and save_role
        partial = self.directory.with_name(self.directory.name + PARTIAL)
        if trainer.is_global_zero:
            if partial.exists():
                shutil.rmtree(partial)  # left by a run that ended while it wrote
            partial.parent.mkdir(parents=True, exist_ok=True)
        try:
            pl_module.save_role(partial)  # type: ignore[operator]
        except Exception as error:
            check_room(error, self.directory)
            raise
        if trainer.is_global_zero:
            partial.rename(self.directory)
        trainer.strategy.barrier()  # what comes next on any rank may read the role
