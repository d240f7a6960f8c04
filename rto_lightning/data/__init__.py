"""Data sets of preferences, prompts and demonstrations, as LightningDataModules.

What a row goes through: `files.py` and `sources.py` read it, `formats.py` finds what its columns mean, `tokenizing.py`
makes ids of it, `store.py` keeps it as Arrow (`rows.py`) or `streaming.py` passes it on, and `order.py` says into which
batch of which device it goes. `module.py` holds what the data modules share.
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
