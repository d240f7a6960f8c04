"""Roles as folders for others: PEFT adapters, Hugging Face models and classifiers, with a model card.

:func:`rto_lightning.export.export.export_role` does it.
"""

from rto_lightning.export.settings import DTYPES, ROLES, ExportSettings

__all__ = ["DTYPES", "ROLES", "ExportSettings"]
