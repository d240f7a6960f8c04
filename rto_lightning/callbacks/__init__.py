"""Callbacks: what happens beside training, and does not change it."""

from rto_lightning.callbacks.progress import PhaseProgressBar
from rto_lightning.callbacks.save_role import SaveRole
from rto_lightning.callbacks.write_predictions import WritePredictions

__all__ = ["PhaseProgressBar", "SaveRole", "WritePredictions"]
