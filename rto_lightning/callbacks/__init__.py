"""Callbacks: what happens beside training, and does not change it."""

from rto_lightning.callbacks.collapse import StopOnCollapse
from rto_lightning.callbacks.log_frontier import LogFrontier
from rto_lightning.callbacks.log_reward_histograms import LogRewardHistograms
from rto_lightning.callbacks.log_samples import LogSamples
from rto_lightning.callbacks.memory_report import MemoryReport
from rto_lightning.callbacks.progress import PhaseProgressBar
from rto_lightning.callbacks.save_checkpoints import SaveCheckpoints
from rto_lightning.callbacks.save_role import SaveRole
from rto_lightning.callbacks.write_predictions import WritePredictions

__all__ = [
    "LogFrontier",
    "LogRewardHistograms",
    "LogSamples",
    "MemoryReport",
    "PhaseProgressBar",
    "SaveCheckpoints",
    "SaveRole",
    "StopOnCollapse",
    "WritePredictions",
]
