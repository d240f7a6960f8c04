"""What the command writes into a stage's folder while it runs: its settings and its metrics."""

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from rto_lightning.runs.folder import config_files
from rto_lightning.runs.metrics_file import MetricsFileLogger
from rto_lightning.secrets import mask_yaml


class SaveRunConfig(SaveConfigCallback):
    """Writes the settings into the stage's folder as the newest file there; earlier, different ones are kept."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes `config.yaml` (`config-test.yaml` and so on for the commands that do not train)."""
        text = mask_yaml(self.parser.dump(self.config, skip_unset=False))
        command = str(getattr(stage, "value", stage))
        stem = "config" if command == "fit" else f"config-{command}"
        directory = Path(trainer.default_root_dir)
        directory.mkdir(parents=True, exist_ok=True)
        files = config_files(directory, stem)
        if not files or files[-1].read_text(encoding="utf-8") != text:
            name = f"{stem}-{len(files) + 1}.yaml" if files else f"{stem}.yaml"
            (directory / name).write_text(text, encoding="utf-8")


def with_default_loggers(
    named: Sequence[Logger], root: Path, command: str, resumed_steps: int | None = None
) -> list[Logger]:
    """The loggers that the user named, or TensorBoard; and `metrics.csv`, unless a CSVLogger is named.

    They write below a stage's folder: into new folders, or into those of the run that goes on.

    Args:
        named: Loggers of the user; none for TensorBoard.
        root: The stage's folder.
        command: `fit` or another.
        resumed_steps: Optimizer steps before the checkpoint to go on from; None in a new run.
    """
    number, run = 1, command
    while any((root / kind / run).exists() for kind in ("tensorboard", "metrics")):
        last, number = run, number + 1
        run = f"{command}-{number}"
    if resumed_steps is not None and number > 1:
        run = last
    tensorboard = TensorBoardLogger(save_dir=root / "tensorboard", name="", version=run, purge_step=resumed_steps)
    loggers = list(named) or [tensorboard]
    if not any(isinstance(logger, CSVLogger) for logger in loggers):
        loggers.append(MetricsFileLogger(root / "metrics", run, resumed_steps))
    return loggers
