"""Callbacks: what happens beside training, and does not change it."""

from rto_lightning.callbacks.collapse import StopOnCollapse
from rto_lightning.callbacks.memory_report import MemoryReport
from rto_lightning.callbacks.progress import PhaseProgressBar
from rto_lightning.callbacks.save_checkpoints import SaveCheckpoints
from rto_lightning.callbacks.save_role import SaveRole
from rto_lightning.callbacks.write_predictions import WritePredictions

__all__ = ["MemoryReport", "PhaseProgressBar", "SaveCheckpoints", "SaveRole", "StopOnCollapse", "WritePredictions"]
