"""Which rows a training batch holds, which of them a process gets, and where a resumed run goes on.

A batch is global: batch i of an epoch holds the same rows on any number of processes. Process r of W takes the
r-th of W equal, contiguous shares of it, so that what the processes compute, concatenated, stands in the order of
a single process.
"""

import math
from collections.abc import Iterator, Sized
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loops.progress import _ProcessedTracker
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from rto_lightning.errors import UserError


def check_divisible(batch_size: int, num_replicas: int) -> None:
    """Checks that a batch can be shared equally.

    Raises:
        UserError: If it cannot.
    """
    if batch_size % num_replicas:
        lower = batch_size // num_replicas * num_replicas
        either = f"{lower} or {lower + num_replicas}" if lower else str(num_replicas)
        raise UserError(
            f"data.batch_size {batch_size}, the rows of a batch over all devices, cannot be shared equally by "
            f"{num_replicas} devices; set it to a multiple of {num_replicas} such as {either}."
        )


def processed_batches(trainer: Trainer) -> int:
    """How many training batches a run has processed so far, in all epochs and before it was resumed.

    Lightning's counts within an epoch and of epochs are no substitute: after a checkpoint of the end of an epoch is
    loaded, the finished epoch is counted a second time.
    """
    total = trainer.fit_loop.epoch_loop.batch_progress.total
    assert isinstance(total, _ProcessedTracker)
    return total.processed


class GlobalBatchSampler(DistributedSampler[int]):
    """The rows of one process: its shares of full global batches, which are shuffled by seed and epoch.

    It is a DistributedSampler because Lightning replaces every other kind by its own.

    Args:
        rows: N rows.
        batch_size: B, rows of a global batch. Each epoch has N // B batches, the rest of its rows is left out.
        num_replicas: W, processes that share the rows. It must divide B.
        rank: Which of them this is, from 0.
        seed: The order of an epoch follows from `seed` plus the number of the epoch.
    """

    def __init__(self, rows: Sized, batch_size: int, num_replicas: int, rank: int, seed: int) -> None:
        super().__init__(rows, num_replicas, rank, shuffle=True, seed=seed, drop_last=True)  # type: ignore[arg-type]
        check_divisible(batch_size, num_replicas)
        self.share = batch_size // num_replicas
        """Rows of a batch that this process takes."""
        self.batches = len(rows) // batch_size
        """Batches of an epoch."""
        self.trainer: Trainer | None = None

    def follow(self, trainer: Trainer) -> None:
        """Takes epoch and position from what a trainer has processed, so that a resumed run goes on where it was."""
        self.trainer = trainer

    def __len__(self) -> int:
        return self.batches * self.share

    def __iter__(self) -> Iterator[int]:
        epoch, first = self._position()
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(len(self.dataset), generator=generator)  # type: ignore[arg-type]
        shape = (self.batches, self.num_replicas, self.share)
        batches = order[: math.prod(shape)].view(shape)
        for batch in batches[first:, self.rank]:
            yield from batch.tolist()

    def _position(self) -> tuple[int, int]:
        """The epoch, and the first of its batches that is still to come."""
        if self.trainer is None:
            return self.epoch, 0
        limit = self.trainer.limit_train_batches
        in_epoch = min(self.batches, limit) if isinstance(limit, int) else int(self.batches * limit)
        return divmod(processed_batches(self.trainer), max(1, in_epoch))


class ResumableLoader(DataLoader[Any]):
    """Tells Lightning that a run can resume within an epoch: the sampler's position follows the trainer's."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: see `GlobalBatchSampler.follow`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""
