"""Short hashes that tell base models and adapters apart, whatever their folders are called.

They are read from the weight files, so that data type, quantization and what is loaded do not matter.
"""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from rto_lightning.backbone.model_files import ADAPTER_FILE, weight_files
from rto_lightning.errors import UserError

_TENSORS, _ROWS, _COLUMNS = 16, 8, 64


def base_fingerprint(model: str, revision: str | None = None) -> str:
    """Sixteen hex digits from slices of evenly spaced weight matrices, rounded to bfloat16.

    Args:
        model: hub name or local folder.
        revision: revision on the hub.

    Raises:
        UserError: if the model has no safetensors weights, or its index names tensors that its files do not hold.
    """
    files = weight_files(model, revision)
    names = sorted(files)
    digest = hashlib.sha256()
    for name in names[:: max(1, len(names) // _TENSORS)]:
        try:
            with safe_open(files[name], framework="pt") as weights:
                rows = weights.get_slice(name)[:_ROWS]
        except (SafetensorError, IndexError, TypeError) as error:  # the latter two for a tensor without dimensions
            raise UserError(f"{files[name]} does not hold the tensor {name} in rows; get {model} anew.") from error
        corner = rows if rows.dim() < 2 else rows[:, :_COLUMNS]
        digest.update(name.encode())
        digest.update(corner.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def adapter_fingerprint(folder: Path) -> str:
    """Sixteen hex digits from all weights of a saved adapter."""
    return hashlib.sha256((folder / ADAPTER_FILE).read_bytes()).hexdigest()[:16]
