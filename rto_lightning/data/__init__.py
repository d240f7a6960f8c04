"""Data sets of preferences, prompts and demonstrations, as LightningDataModules.

`sources.py` reads rows, `formats.py` finds what their columns mean, `module.py` holds what the data modules share.
"""

from rto_lightning.data.batches import DemonstrationBatch, PreferenceBatch, PromptBatch
from rto_lightning.data.demonstrations import DemonstrationDataModule
from rto_lightning.data.preferences import PreferenceDataModule
from rto_lightning.data.prompts import PromptDataModule

__all__ = [
    "DemonstrationBatch",
    "DemonstrationDataModule",
    "PreferenceBatch",
    "PreferenceDataModule",
    "PromptBatch",
    "PromptDataModule",
]
