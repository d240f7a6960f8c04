"""One command on one stage, in this process: what the command line and the pipeline share."""

from collections.abc import Sequence
from pathlib import Path

from rto_lightning.cli.config_errors import check_config_files
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
    config_files = given_config_files(args)
    check_config_files(config_files)
    from rto_lightning.cli.lightning_cli import RTOCLI, AlreadyFinished, PipelineStageCLI, run

    try:
        run(args, config_files, PipelineStageCLI if of_pipeline else RTOCLI)
    except AlreadyFinished as finished:
        print(finished)
    except MissingInputError as error:
        raise UserError(with_command(error, config_files)) from error


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

    The configuration `<stage>.yaml` is looked for beside each of the files in use, as overlays lie beside overlays.
    """
    beside = dict.fromkeys(Path(name).parent / f"{error.stage}.yaml" for name in config_files)
    found = [str(path) for path in beside if path.is_file()] or [f"{error.stage.upper()}_CONFIG.yaml"]
    command = " ".join(["rto-lightning fit", *(f"--config {name}" for name in found)])
    return f"{str(error).rstrip('.')}; make it first with: {command}"
