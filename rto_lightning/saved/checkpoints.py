"""Weights out of a checkpoint into a module, without a trainer and in one process.

A file is read with `weights_only`, shards as :mod:`rto_lightning.backbone.shard_files` does, so that neither runs code.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rto_lightning.backbone.shard_files import load_shards, read_index
from rto_lightning.errors import UserError, first_line
from rto_lightning.runs.checkpoint_files import METADATA_FILE

_WEIGHTS = "state_dict"


class StoredWeights:
    """The weights in a checkpoint.

    Args:
        path: a checkpoint file, or a folder of shards that any number of ranks wrote.

    Raises:
        UserError: if it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._whole: dict[str, Tensor] | None = None
        try:
            if path.is_dir():
                sizes = read_index(path).state_dict_metadata
                prefix = f"{_WEIGHTS}."
                self.shapes = {
                    name.removeprefix(prefix): torch.Size(getattr(entry, "size", ()))
                    for name, entry in sizes.items()
                    if name.startswith(prefix)
                }
                contents = torch.load(path / METADATA_FILE, map_location="cpu", weights_only=True)
            else:
                contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                whole = self._whole = contents[_WEIGHTS]
                self.shapes = {name: weight.shape for name, weight in whole.items()}
            self.step: int = contents["global_step"]
        except UserError:
            raise
        except Exception as error:  # a damaged pickle raises anything
            raise UserError(f"the checkpoint {path} cannot be read ({first_line(error)}); name another one.") from error

    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        """Copy weights into tensors of the same shape, in place; of shards only what is asked for is read.

        Args:
            targets: by the names in the checkpoint.

        Raises:
            UserError: if one is missing or has another shape: the settings are not those of the run.
        """
        for name, target in targets.items():
            if self.shapes.get(name) != target.shape:
                what = "lacks" if name not in self.shapes else "has another shape for"
                raise UserError(
                    f"the checkpoint {self.path} {what} {name}; config.yaml must be that of the run that wrote it."
                )
        with torch.no_grad():
            if self._whole is not None:
                for name, target in targets.items():
                    target.copy_(self._whole[name])
                return
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                plain = {name: target.detach() for name, target in targets.items()}
                load_shards({_WEIGHTS: plain}, self.path, no_dist=True)
