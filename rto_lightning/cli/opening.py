"""Stages as the `config.yaml` of a run describes them, in memory and without a run of their own."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import set_parsing_settings
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from rto_lightning.cli.config_errors import explain
from rto_lightning.cli.lightning_cli import RTOCLI, run, stage_module_class
from rto_lightning.cli.short_names import know_optimizers
from rto_lightning.errors import UserError, user_error_within
from rto_lightning.runs.folder import config_files, last_checkpoint

if TYPE_CHECKING:
    from rto_lightning.data.module import ChatDataModule
    from rto_lightning.modules import StageModule


def load_stage_module(config: Path, trusted: bool = False) -> "StageModule":
    """The stage of a `config.yaml`, without data and trainer, before its weights are loaded.

    Args:
        config: the file.
        trusted: whether to import what it names, whatever it is.

    Raises:
        UserError: if this version does not take its settings, if a role that they name is not there, or if they name
            classes of other programs and are not trusted.
    """
    from rto_lightning.saved.source import check_code, read_config

    know_optimizers()
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(stage_module_class(), "model", subclass_mode=True)
    try:
        settings = read_config(config)["model"]
        if not trusted:
            check_code(settings, config)
        module: StageModule = parser.instantiate(parser.parse_object({"model": settings})).model
    except argparse.ArgumentError as error:
        raise UserError(f"the settings in {config} do not fit this version: {explain(str(error))}") from error
    except ValueError as error:  # around the error of a stage, the parser says which class it was
        raise user_error_within(error) or error from None
    return module


def open_stage(folder: str | Path, weights: Literal["start", "last"] = "last") -> "tuple[StageModule, ChatDataModule]":
    """The module of a stage with all its roles, and its data, without a trainer and on the CPU: for a notebook.

    Of an RTO stage `rollout` and `make_experience` can be called, on `next(iter(data.first_epoch()))` for example. The
    stage's `config.yaml` may name code, which is then imported as `fit` would.

    Args:
        folder: the stage's folder.
        weights: of the roles that are trained: as the run began with them, or as its last checkpoint has them.

    Raises:
        UserError: if the folder has no settings or, for `last`, no checkpoint; if a role that they name is gone.
    """
    from rto_lightning.saved.checkpoints import StoredWeights

    root = Path(folder)
    files, checkpoint = config_files(root), last_checkpoint(root)
    if not files:
        raise UserError(f"{root} holds no config.yaml; name the folder of a stage that has run.")
    if weights == "last" and checkpoint is None:
        raise UserError(f"{root} holds no checkpoint; ask for the weights of its start.")
    cli = run(["fit", "--config", str(files[-1])], [str(files[-1])], ReadingCLI)
    module, data = cli.model, cli.datamodule
    module.configure_model()
    if weights == "last" and checkpoint is not None:
        StoredWeights(checkpoint).read_into(module.kept_tensors())
    data.chat = module.chat
    data.setup("fit")
    return module, data


class ReadingCLI(RTOCLI):
    """Builds module and data as `fit` does, but no trainer, and runs nothing."""

    def before_instantiate_classes(self) -> None:
        """Settle nothing: no run begins or goes on."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """None: nothing is run."""
        return None  # type: ignore[return-value]

    def _run_subcommand(self, subcommand: str) -> None:
        pass
