"""Writes what `predict` returns as a JSONL file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from rto_lightning.errors import UserError


class WritePredictions(BasePredictionWriter):
    """Writes one line for each answer, batch by batch; each rank of several writes a file of its own.

    Args:
        path: The JSONL file.

    Raises:
        UserError: If the file exists.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__("batch")
        self.path = Path(path)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the file, before anything is predicted."""
        if trainer.world_size > 1:
            self.path = self.path.with_suffix(f".{trainer.global_rank}{self.path.suffix}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.path.open("x").close()
        except FileExistsError:
            raise UserError(
                f"{self.path} exists already; remove it or choose another --trainer.default_root_dir."
            ) from None

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Sequence[dict[str, Any]],
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Appends the rows of one batch."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in prediction)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says where the answers are."""
        print(f"answers: {self.path}")
