"""Short hashes that tell base models and adapters apart, whatever their folders are called.

They are read from the weight files, so that data type, quantization and what is loaded do not matter.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from rto_lightning.errors import UserError

ADAPTER_FILE = "adapter_model.safetensors"
_TENSORS, _ROWS, _COLUMNS = 16, 8, 64


def base_fingerprint(model: str, revision: str | None = None) -> str:
    """Sixteen hex digits from slices of evenly spaced weight matrices, rounded to bfloat16.

    Args:
        model: hub name or local folder.
        revision: revision on the hub.

    Raises:
        UserError: if the model has no safetensors weights.
    """
    files = _weight_files(model, revision)
    names = sorted(files)
    digest = hashlib.sha256()
    for name in names[:: max(1, len(names) // _TENSORS)]:
        with safe_open(files[name], framework="pt") as weights:
            rows = weights.get_slice(name)[:_ROWS]
        corner = rows if rows.dim() < 2 else rows[:, :_COLUMNS]
        digest.update(name.encode())
        digest.update(corner.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def adapter_fingerprint(folder: Path) -> str:
    """Sixteen hex digits from all weights of a saved adapter."""
    return hashlib.sha256((folder / ADAPTER_FILE).read_bytes()).hexdigest()[:16]


def _weight_files(model: str, revision: str | None) -> dict[str, str]:
    """The file that holds each tensor."""
    options = {"revision": revision or "main", "_raise_exceptions_for_missing_entries": False}
    index = cached_file(model, SAFE_WEIGHTS_INDEX_NAME, **options)
    if index is not None:
        shards: dict[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        paths = {shard: cached_file(model, shard, **options) for shard in set(shards.values())}
        return {name: str(paths[shard]) for name, shard in shards.items()}
    path = cached_file(model, SAFE_WEIGHTS_NAME, **options)
    if path is None:
        raise UserError(
            f"{model} has no {SAFE_WEIGHTS_NAME}; other weight formats are not loaded, as they can run code."
        )
    with safe_open(path, framework="pt") as weights:
        return {name: str(path) for name in weights.keys()}  # noqa: SIM118  # a safetensors file is no dict
