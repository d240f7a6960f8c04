"""One trainer for both parts: a device, a few iterations, nothing written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from rto_lightning.backbone import Sequences
from rto_lightning.data import PromptBatch
from rto_lightning.modules import RTOModule


class Prompts(LightningDataModule):
    """Batches of prompts that are tokens already.

    Args:
        batches: of one size.
    """

    def __init__(self, batches: list[PromptBatch]) -> None:
        super().__init__()
        self.batches = batches
        self.batch_size = len(batches[0])

    def train_dataloader(self) -> DataLoader[Any]:
        """The batches as they are."""
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]


def prompt_batch(input_ids: Tensor, attention_mask: Tensor, first_row: int = 0) -> PromptBatch:
    """Prompts (B, P) int64 as a batch whose messages say nothing."""
    count = len(input_ids)
    messages = [[{"role": "user", "content": ""}] for _ in range(count)]
    return PromptBatch(input_ids, attention_mask, torch.arange(count) + first_row, messages)


def make_trainer(device: torch.device, folder: Path, iterations: int, *callbacks: Callback, **options: Any) -> Trainer:
    """A trainer on one device that logs to memory only."""
    cuda = device.type == "cuda"
    return Trainer(
        default_root_dir=folder,
        accelerator="gpu" if cuda else "cpu",
        devices=[device.index or 0] if cuda else 1,
        max_steps=iterations,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


def train(
    module: RTOModule, device: torch.device, sequences: Sequences, folder: Path, before: Callable[[], None]
) -> dict[str, float]:
    """One iteration on the prompts of some sequences; returns what was logged.

    Args:
        module: the stage.
        device: where.
        sequences: their prompts are the batch.
        folder: where nothing is written.
        before: called when the roles are loaded and nothing is trained yet.
    """

    class Before(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            before()

    width = sequences.prompt_width
    batch = prompt_batch(sequences.input_ids[:, :width], sequences.attention_mask[:, :width])
    trainer = make_trainer(device, folder, 1, Before())
    trainer.fit(module, Prompts([batch]))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}
