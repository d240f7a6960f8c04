"""One command on one stage, in this process: what the command line and the pipeline share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from rto_lightning.cli.config_errors import ConfigurationError, check_config_files
from rto_lightning.cli.quiet import quiet_lightning
from rto_lightning.errors import MissingInputError, UserError

STAGE_COMMANDS = ("fit", "validate", "test", "predict")


def run_stage(args: Sequence[str], of_pipeline: bool = False) -> None:
    """Runs one stage in this process.

    Args:
        args: A command of `STAGE_COMMANDS` and its options, as on the command line.
        of_pipeline: Whether other stages follow in this process, which then must be the only one.

    Raises:
        UserError: For every mistake that the user can cure, already told as one sentence.
    """
    config_files = checked_config_files(args)
    quiet_lightning()  # before the first import of what speaks when it is imported
    from rto_lightning.cli.lightning_cli import RTOCLI, AlreadyFinished, PipelineStageCLI, run

    try:
        run(args, config_files, PipelineStageCLI if of_pipeline else RTOCLI)
    except AlreadyFinished as finished:
        print(finished)
    except MissingInputError as error:
        raise UserError(with_command(error, config_files)) from error


def check_stage(args: Sequence[str]) -> None:
    """Reads the settings of a stage that is to run later; builds nothing and looks for no role.

    Args:
        args: As of `run_stage`.

    Raises:
        ConfigurationError: If they hold something the stage does not take.
    """
    config_files = checked_config_files(args)
    quiet_lightning()
    from rto_lightning.cli.lightning_cli import ParsingCLI, run

    run(args, config_files, ParsingCLI)


def checked_config_files(args: Sequence[str]) -> list[str]:
    """The configuration files among the arguments of a command on a stage, in their order.

    Raises:
        ConfigurationError: If one is missing or no YAML mapping, is a list of stages, or stands in the wrong place.
    """
    config_files = given_config_files(args)
    check_config_files(config_files)
    for name in config_files:
        if "stages" in _content(name):
            raise ConfigurationError(
                f"{name} is a list of stages; `rto-lightning pipeline --config {name}` runs it, and other commands "
                "take the file of one stage."
            )
    _check_order(config_files)
    return config_files


def given_config_files(args: Sequence[str]) -> list[str]:
    """The values of every `--config` (or `-c`) among command-line arguments, in their order."""
    files = []
    for position, argument in enumerate(args):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-c"):
            if equals:
                files.append(value)
            elif position + 1 < len(args):
                files.append(args[position + 1])
    return files


def with_command(error: MissingInputError, config_files: Sequence[str]) -> str:
    """Adds to the sentence of a `MissingInputError` the command that makes the input.

    The configuration `<stage>.yaml` is looked for beside each of the files in use, as overlays lie beside overlays; an
    overlay that suits every stage, such as a precision or a strategy, is taken over.
    """
    found: dict[str, None] = {}
    for name in config_files:
        beside = Path(name).parent / f"{error.stage}.yaml"
        if beside.is_file():
            found[str(beside)] = None
        elif found and _suits_every_stage(name):
            found[name] = None
    names = found or [f"{error.stage.upper()}_CONFIG.yaml"]
    command = " ".join(["rto-lightning fit", *(f"--config {name}" for name in names)])
    return f"{str(error).rstrip('.')}; make it first with: {command}"


def _suits_every_stage(config_file: str) -> bool:
    """Whether a file says nothing but what every stage has: settings of the trainer and of the base model."""
    content = _content(config_file)
    return set(content) <= {"trainer", "model"} and set(content.get("model", {})) <= {"backbone"}


def _check_order(config_files: Sequence[str]) -> None:
    """Raise a ConfigurationError for an overlay of a stage that stands before the file that names the stage."""
    overlay = None
    for name in config_files:
        model = _content(name).get("model")
        if isinstance(model, dict) and "class_path" not in model:
            overlay = overlay or name
        elif model is not None and overlay is not None:
            raise ConfigurationError(f"{overlay} is an overlay of a stage; put it after {name}, which names the stage.")


def _content(config_file: str) -> dict[str, Any]:
    """The settings of a file, or of a text that is given in the place of one."""
    in_place = config_file.lstrip().startswith("{") or "\n" in config_file
    content: dict[str, Any] = yaml.safe_load(config_file if in_place else Path(config_file).read_text(encoding="utf-8"))
    return content
