"""Writing and reading checkpoints as files that are whole."""

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from rto_lightning.errors import UserError, first_line
from rto_lightning.runs.files import remove, written_whole
from rto_lightning.runs.limits import Limits

STOPPED_EARLY = "stopped_early"
"""Key of the limits of a run that a callback has ended before its steps and epochs."""

METADATA_FILE = "meta.pt"
"""What of a sharded checkpoint is no tensor, as Lightning names it."""


class WholeCheckpointIO(TorchCheckpointIO):
    """Checkpoints of a file system, written beside their place and moved there when they are on the disk.

    Lightning's own goes through a copy of the file in memory and a temporary folder. Paths with a scheme (`s3://...`)
    are left to it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes a checkpoint.

        Raises:
            UserError: if there is no room for it; older ones stay as they are.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(place) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self, path: Any, map_location: Callable[..., Any] | None = lambda storage, _: storage, weights_only: Any = None
    ) -> dict[str, Any]:
        """Reads a checkpoint.

        Raises:
            UserError: if it is no checkpoint, or not whole.
        """
        with _told_if_damaged(path):
            return _of_run(super().load_checkpoint(path, map_location, weights_only is not False), path)

    def remove_checkpoint(self, path: Any) -> None:
        """Removes a checkpoint."""
        if "://" in str(path):
            super().remove_checkpoint(path)
        else:
            remove(Path(path))


@dataclass(frozen=True)
class Progress:
    """How far the run of a checkpoint has come."""

    steps: int
    """Optimizer steps (for RTO: iterations) that are done."""
    epochs: int
    """Epochs that are complete."""
    stopped_early: Limits | None
    """The limits of a run that a callback, such as the Timer of `max_time`, has ended before its steps and epochs."""

    def has_reached(self, limits: Limits) -> bool:
        """Whether a run with these limits ends here."""
        counted = zip((self.steps, self.epochs), limits, strict=False)
        return self.stopped_early == limits or any(limit not in (None, -1) and done >= limit for done, limit in counted)


def progress_of(checkpoint: Path) -> Progress:
    """How far the run of a checkpoint, a file or a folder of shards, has come.

    Raises:
        UserError: if it cannot be read.
    """
    file = checkpoint / METADATA_FILE if checkpoint.is_dir() else checkpoint
    with _told_if_damaged(file):
        contents = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if not checkpoint.is_dir():
            _of_run(contents, file)
        epochs = contents["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        return Progress(contents["global_step"], epochs, contents.get(STOPPED_EARLY))


def _of_run(contents: Any, path: Any) -> dict[str, Any]:
    if not isinstance(contents, dict) or not {"state_dict", "global_step"} <= set(contents):
        raise UserError(f"the checkpoint {path} holds no state of a run; name one that a stage here has written.")
    return contents


@contextmanager
def _told_if_damaged(path: Any) -> Iterator[None]:
    try:
        yield
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise UserError(
            f"the checkpoint {path} cannot be read ({first_line(error)}); it is damaged or was not written by a stage "
            "here: name another one."
        ) from error
