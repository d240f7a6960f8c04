"""Warns before a run that its memory will not suffice, and says afterwards what it took."""

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

if TYPE_CHECKING:
    from rto_lightning.memory import Change, MemoryPlan


class MemoryReport(Callback):
    """Plans the memory of a fit, and writes plan and measured peak side by side when it has ended.

    It is silent about a stage that cannot be planned, such as one with a model of unknown structure.

    Args:
        path: The JSON file, in bytes: `planned`, or null without a plan, and `measured_peak` since the models were
            loaded. That is what tensors took of a GPU, and the resident memory of the process on a CPU.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.plan: MemoryPlan | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Plan, and warn if the plan is above what the device has, before any weight is loaded."""
        from rto_lightning import memory  # late, as it imports the models' libraries
        from rto_lightning.modules import StageModule

        if stage != "fit" or not isinstance(pl_module, StageModule):
            return
        device, precision = trainer.strategy.root_device, str(trainer.precision)
        data, foreach = getattr(trainer, "datamodule", None), device.type == "cuda"
        with suppress(Exception):  # a plan that fails must not end a run
            parallelism = memory.running_parallelism(trainer, pl_module)
            workload = memory.workload_of(pl_module, data, precision, parallelism)
            plan = memory.plan_memory(workload, foreach=foreach)
            self.plan = plan if device.type == "cuda" else replace(plan, process=memory.resident_bytes())
            available = memory.available_to_process(device, parallelism)
            if available is not None and self.plan.peak > available:
                changes: list[Change] = []
                with suppress(Exception):  # nor may proposals that fail keep the warning back
                    changes = memory.proposed_changes(self.plan, pl_module, data, precision, foreach, parallelism)
                rank_zero_warn(memory.warning(self.plan, available, changes))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from here: weight files that are mapped while they are read can leave memory again."""
        from rto_lightning import memory

        memory.reset_peak(trainer.strategy.root_device)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file and print both peaks."""
        if not trainer.is_global_zero:
            return
        from rto_lightning import memory

        measured = memory.peak_bytes(trainer.strategy.root_device)
        contents = {"planned": self.plan.as_dict() if self.plan is not None else None, "measured_peak": measured}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
        figures, before = f"{memory.show_bytes(measured)} measured", ""
        if self.plan is not None:
            figures = f"{memory.show_bytes(self.plan.peak)} planned, {figures}"
            if self.plan.process:
                before = f" ({memory.show_bytes(self.plan.process)} of each before loading)"
        print(f"peak memory: {figures}{before}: {self.path}")
