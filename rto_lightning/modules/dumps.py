"""Files of steps that were not finite; `replay.py` reads them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from rto_lightning.errors import first_line
from rto_lightning.seeding import run_seed

if TYPE_CHECKING:
    from rto_lightning.modules.stage import StageModule


def write_dump(stage: "StageModule", path: Path, contents: Mapping[str, Any]) -> None:
    """Write what :func:`replay` needs, as a file that `torch.load(path, weights_only=True)` reads.

    Beside the contents it has the trained weights of mode `adapters`; those of mode `full` would fill the disk.

    Raises:
        OSError: if it cannot be written; an older file then is what it was.
    """
    dump = {
        "stage": stage.stage_name,
        "step": stage.global_step,
        "seed": getattr(stage, "seed", run_seed(None)),
        "precision": str(stage.trainer.precision),
        "weights": stage.kept_tensors() if stage.settings.mode == "adapters" else None,
        **contents,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        torch.save(tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), dump), partial)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        partial.unlink(missing_ok=True)
        raise OSError(first_line(error)) from error
