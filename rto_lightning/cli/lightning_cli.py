"""LightningCLI as this project uses it: one stage, one folder, one sentence for each mistake."""

import argparse
import importlib
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import set_parsing_settings
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from rto_lightning.callbacks import MemoryReport, PhaseProgressBar, SaveCheckpoints, SaveRole, WritePredictions
from rto_lightning.cli.config_errors import ConfigurationError, explain
from rto_lightning.cli.nested_null import null_as_object
from rto_lightning.cli.quiet import quiet_libraries, quiet_lightning
from rto_lightning.cli.run_files import SaveRunConfig, with_default_loggers
from rto_lightning.cli.short_names import know_optimizers
from rto_lightning.errors import Stopped, UserError, user_error_within
from rto_lightning.runs.checkpoint_files import progress_of
from rto_lightning.runs.folder import (
    CHECKPOINTS,
    MEMORY_FILE,
    PREDICTIONS_FILE,
    ROLE_FOLDER,
    check_same_settings,
    checkpoint_to_resume,
    config_files,
    last_checkpoint,
    own_checkpoint,
)
from rto_lightning.runs.limits import limits_of_settings
from rto_lightning.runs.signals import StopSignals
from rto_lightning.secrets import check_not_masked, mask_yaml

_KEYWORD_CHECKPOINTS = ("last", "registry")


def stage_module_class() -> type[LightningModule]:
    """The class that every stage's module extends; stages and data modules get known by their short names."""
    importlib.import_module("rto_lightning.data")
    from rto_lightning.modules import StageModule

    return StageModule


class AlreadyFinished(Exception):
    """The run that is to go on has ended before."""


class RTOCLI(LightningCLI):
    """LightningCLI over the stages' modules.

    Args:
        args: A command and its options.
        config_files: The `--config` files among them, for the wording of errors.
    """

    compares_settings = True
    """Whether a run that goes on is asked to have the settings it began with."""

    def __init__(self, args: Sequence[str], config_files: Sequence[str]) -> None:
        self.config_files = config_files
        self.resumed_steps: int | None = None
        """Optimizer steps before the checkpoint that the run of this folder goes on from; None in a new run."""
        # Errors come as exceptions, which `explain` makes readable, instead of usage texts.
        quiet_parsers: dict[str, Any] = {command: {"exit_on_error": False} for command in self.subcommands()}
        super().__init__(
            stage_module_class(),
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_defaults={"log_every_n_steps": 1},
            seed_everything_default=1,
            auto_configure_optimizers=False,  # modules take their optimizers as arguments
            parser_kwargs={
                "prog": "rto-lightning",
                "description": "Train or measure one stage.",
                "exit_on_error": False,
                **quiet_parsers,
            },
            args=null_as_object(args),
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the arguments.

        Raises:
            ConfigurationError: If they, or a file they name, hold something the parser does not take.
        """
        try:
            self.config = parser.parse_args(args)
        except argparse.ArgumentError as error:
            raise ConfigurationError(explain(str(error), self.config_files, self._accepted(args[0]))) from error
        check_not_masked(self.config.as_dict().get(args[0]))

    def _parse_ckpt_path(self) -> None:
        """Checks the path; settings are not taken from checkpoints, as LightningCLI would."""
        command = self.config[self.config.subcommand]
        path = command.get("ckpt_path")
        if path and not Path(path).exists() and not str(path).startswith(_KEYWORD_CHECKPOINTS):
            raise UserError(f"the checkpoint {path} does not exist; check the path after --ckpt_path.")

    def before_instantiate_classes(self) -> None:
        """Settles the stage's folder and where the run goes on, before anything is loaded.

        Raises:
            AlreadyFinished: If the run to go on with has trained its role.
            UserError: If `fit` would have to write over a role, or would mix two runs; or if there is no checkpoint.
        """
        settings = self.config[self.subcommand].trainer
        if settings.default_root_dir is None:
            stem = Path(self.config_files[0]).stem if self.config_files else "run"
            settings.default_root_dir = str(Path("outputs") / stem)
        root, command = Path(settings.default_root_dir), self.config[self.subcommand]
        if command.get("ckpt_path") == "last":
            found = checkpoint_to_resume(root)
            if found is None and self.subcommand != "fit":
                raise UserError(f"there is no checkpoint in {root / CHECKPOINTS}; name one after --ckpt_path.")
            command.ckpt_path = None if found is None else str(found)
        if self.subcommand == "fit" and not settings.fast_dev_run:
            self._settle_start(root, command.ckpt_path)

    def _settle_start(self, root: Path, checkpoint: str | None) -> None:
        """Decides whether a run begins or goes on, and refuses what would mix two."""
        own = own_checkpoint(root, checkpoint)
        role, unfinished = root / ROLE_FOLDER, last_checkpoint(root)
        if own is not None:
            trainer, progress = self.config[self.subcommand].trainer, progress_of(own)
            self.resumed_steps = progress.steps
            if self.compares_settings:
                check_same_settings(root, self._settings_as_yaml())
            if config_files(root):
                self.save_config_callback = None
            limits = limits_of_settings(trainer.max_steps, trainer.max_epochs, trainer.max_time)
            if role.exists() and progress.has_reached(limits):
                raise AlreadyFinished(f"{root} is finished: its role is {role}")
            if trainer.overfit_batches:
                raise UserError(
                    "trainer.overfit_batches does not go with a run that goes on because Lightning begins those "
                    "batches anew; set data.max_train_rows instead."
                )
        if role.exists():
            raise UserError(
                f"{role} exists already and is not written over; choose another --trainer.default_root_dir, "
                "or remove that folder."
            )
        if unfinished is not None and own is None:
            raise UserError(
                f"{root} holds a run that is not finished; go on with it by --ckpt_path last, choose another "
                "--trainer.default_root_dir, or remove that folder."
            )
        if own is not None:
            rank_zero_only(print)(f"Going on from {checkpoint}, at step {self.resumed_steps}.", flush=True)

    def _settings_as_yaml(self) -> str:
        return mask_yaml(self._parser(self.subcommand).dump(self.config[self.subcommand], skip_unset=False))

    def instantiate_classes(self) -> None:
        """Builds data, module and trainer.

        Raises:
            UserError: The error that one of them raised, without what the parser wraps around it.
        """
        try:
            super().instantiate_classes()
        except Exception as error:
            if (told := user_error_within(error)) is None:
                raise
            raise told from None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Builds the trainer; loggers, checkpoints and progress bar are ours where the user names none.

        Raises:
            UserError: If Lightning refuses the settings.
        """
        settings = self.config_init[self.subcommand].trainer
        root = Path(settings.default_root_dir)
        if settings.logger is not False and not settings.barebones:
            named = [] if settings.logger is True else _as_list(settings.logger)
            kwargs["logger"] = with_default_loggers(named, root, str(self.subcommand), self.resumed_steps)
        kwargs["callbacks"] = [*_as_list(settings.callbacks), *self._default_callbacks(settings, root)]
        # Late, as it imports the models' libraries.
        from rto_lightning.strategies import check_checkpoint, check_processes, resolve_strategy

        kwargs["strategy"] = resolve_strategy(settings.strategy)
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError) as error:
            raise UserError(f"the trainer refuses its settings: {_first_sentence(error)}") from error
        check_processes(trainer.strategy)
        check_checkpoint(trainer.strategy, self.config_init[self.subcommand].get("ckpt_path"))
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            with StopSignals(self.trainer.world_size):
                super()._run_subcommand(subcommand)
        except BaseException as error:
            # Processes that Lightning has started wait for this one, where only this signal is heard.
            kill = getattr(self.trainer.strategy.launcher, "kill", None)
            if kill is not None:
                kill(signal.SIGKILL)
            if isinstance(error, Stopped) and not self.trainer.is_global_zero:
                raise SystemExit(error.exit_status) from None  # one process tells it
            raise

    def _default_callbacks(self, settings: Any, root: Path) -> list[Callback]:
        given = _as_list(settings.callbacks)
        callbacks: list[Callback] = []
        if settings.barebones:
            return callbacks
        if settings.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in given):
            callbacks.append(PhaseProgressBar())
        if self.subcommand == "fit" and not settings.fast_dev_run:
            if settings.enable_checkpointing is not False and not any(isinstance(c, SaveCheckpoints) for c in given):
                callbacks.append(SaveCheckpoints())
            callbacks += [SaveRole(root / ROLE_FOLDER), MemoryReport(root / MEMORY_FILE)]
        if self.subcommand == "predict":
            callbacks.append(WritePredictions(root / PREDICTIONS_FILE))
        return callbacks

    def _accepted(self, command: str) -> list[str]:
        parser = self._subcommand_parsers.get(command, self.parser)
        return list(parser.get_defaults(skip_validation=True).keys())


class PipelineStageCLI(RTOCLI):
    """One stage of a pipeline, whose process goes on to the next one."""

    compares_settings = False  # the pipeline has, and its folder may have moved

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """As :meth:`RTOCLI.instantiate_trainer`.

        Raises:
            UserError: for several processes, too.
        """
        trainer = super().instantiate_trainer(**kwargs)
        if trainer.world_size > 1:
            raise UserError(
                f"a pipeline runs its stages in one process, and this one asks for {trainer.world_size}; run the stage "
                "by `rto-lightning fit`, or set trainer.devices to 1."
            )
        return trainer


class ParsingCLI(RTOCLI):
    """Reads the settings of a stage, and builds nothing."""

    def before_instantiate_classes(self) -> None:
        """Settle nothing: no run begins or goes on."""

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def run(args: Sequence[str], config_files: Sequence[str], cli: type[RTOCLI] = RTOCLI) -> RTOCLI:
    """Parses the arguments of one command, builds the stage and runs it.

    Args:
        args: A command and its options.
        config_files: The `--config` files among them.
        cli: What reads them.

    Returns:
        What has read them, with module and data.

    Raises:
        AlreadyFinished: If the run to go on with has ended before.
        UserError: If the settings, or the data and roles they name, cannot be used.
    """
    quiet_libraries()
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # help texts of settings dataclasses
    know_optimizers()
    quiet_lightning()
    try:
        with _process_arguments(args):
            return cli(args, config_files)
    except MisconfigurationException as error:
        raise UserError(_first_sentence(error)) from error


@contextmanager
def _process_arguments(args: Sequence[str]) -> Iterator[None]:
    """Shows `args` as the process's own: Lightning starts the other ranks by repeating `sys.argv`."""
    before = sys.argv
    sys.argv = [before[0], *args]
    try:
        yield
    finally:
        sys.argv = before


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".!") + "."
