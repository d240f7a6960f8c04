"""Callbacks: what happens beside training, and does not change it."""

from rto_lightning.callbacks.progress import PhaseProgressBar
from rto_lightning.callbacks.save_role import SaveRole

__all__ = ["PhaseProgressBar", "SaveRole"]
