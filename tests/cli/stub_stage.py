"""A stage that trains two weights on random numbers: enough for the command line, with no language model."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.utils.data import DataLoader

from rto_lightning.errors import MissingInputError, UserError


@dataclass
class StubAdapterSettings:
    rank: int = 8
    """Rank of the adapter."""


@dataclass
class StubBackboneSettings:
    model: str = "tiny"
    """Name of the base model."""
    adapter: StubAdapterSettings = field(default_factory=StubAdapterSettings)
    """The adapter."""
    second: StubAdapterSettings | None = None
    """Another adapter, or none."""

    def __post_init__(self) -> None:
        if self.model == "bad":
            raise UserError("model.backbone.model bad is no model; choose another.")


class StubBase(LightningModule):
    """Stands for `StageModule`."""

    def finish(self) -> None:
        """Nothing is left to do after the last step."""


class StubStage(StubBase):
    def __init__(
        self,
        backbone: StubBackboneSettings,
        lr: float = 0.1,
        optimizer: OptimizerCallable = torch.optim.SGD,
        dpo: str | None = None,
        interrupt_at: int | None = None,
        phases: bool = False,
    ) -> None:
        """Builds the stage.

        Args:
            backbone: Its base.
            lr: Learning rate.
            optimizer: Builds the optimizer.
            dpo: A role that must exist.
            interrupt_at: Step at which training fails.
            phases: Whether phases are shown, as RTO does.
        """
        super().__init__()
        self.settings, self.lr, self.optimizer = backbone, lr, optimizer
        self.interrupt_at, self.phases = interrupt_at, phases
        self.layer = torch.nn.Linear(2, 1)
        if dpo is not None and not Path(dpo).exists():
            raise MissingInputError(f"the dpo role {dpo} does not exist.", stage="dpo")

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.global_step == self.interrupt_at:
            raise RuntimeError("the power went out")
        if self.phases:
            for phase in ("rollout", "scoring", "update"):
                self.trainer.progress_bar_callback.show_phase(phase, 12.345)
        loss = self.layer(batch).square().mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("validation/loss", self.layer(batch).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters(), lr=self.lr)

    def save_role(self, path: Path) -> None:
        path.mkdir()
        weights = {"model": self.settings.model, "weight": self.layer.weight.tolist()}
        (path / "role.json").write_text(json.dumps(weights))


class StubData(LightningDataModule):
    def __init__(self, rows: int = 8, batch_size: int = 2) -> None:
        super().__init__()
        self.rows, self.batch_size = rows, batch_size

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.ones(self.rows, 2), batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(torch.ones(2, 2), batch_size=2)


class StubNamedData(StubData):
    def __init__(self, train: str) -> None:
        super().__init__()
        self.train = train
