"""What to export, and how. Nothing here needs torch, so that a mistake on the command line is told at once."""

from dataclasses import dataclass
from pathlib import Path

ROLES = ("policy", "dpo", "reward", "critic")
"""What can be exported."""
DTYPES = ("bfloat16", "float16", "float32")
"""Data types of a whole model."""


@dataclass(frozen=True)
class ExportSettings:
    """What to export, and how."""

    source: Path
    """The folder of a stage, the folder of a role, or a checkpoint."""
    target: Path
    """A folder that is not there, or empty."""
    role: str | None = None
    """Which role of a stage; None is the one that it trains."""
    merge: bool = False
    """Whether an adapter is added to the weights of its base model, and a reward role becomes a sequence classifier."""
    dtype: str | None = None
    """Data type of a whole model, one of `DTYPES`; None is bfloat16. An adapter stays as it was trained, float32."""
    base_model: str | None = None
    """Folder or hub name of an adapter's base model, if it is not where it was in training."""
    max_shard_size: str = "5GB"
    """Largest file of a whole model."""
    check: bool = True
    """Whether to compare with the role: in float32, which takes 4 bytes a weight."""
    trust_remote_code: bool = False
    """Whether to run code that the base model brings along, and to import what `config.yaml` names beyond this project
    and torch."""
    push_to_hub: str | None = None
    """USER/NAME of a repository on the Hugging Face hub to upload to."""
    private: bool = False
    """Whether that one is private, if it is new."""
