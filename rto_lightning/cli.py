"""The `rto-lightning` command: `fit`, `validate`, `test`, `predict` on a stage, `pipeline` on a list of them.

This file decides which command is meant and how errors are shown. What needs Lightning and torch is imported
only once it is needed, so that help, version and misspelled paths are answered at once.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from rto_lightning.config_errors import ConfigurationError, check_config_files
from rto_lightning.errors import MissingInputError, UserError

STAGE_COMMANDS = ("fit", "validate", "test", "predict")

USAGE = """\
usage: rto-lightning COMMAND [options]

commands on one stage (SFT, DPO, reward model or RTO, as the configuration says):
  fit --config FILE.yaml        train it; everything goes to the folder trainer.default_root_dir
  validate --config FILE.yaml   measure it on the validation data
  test --config FILE.yaml       measure it on the test data
  predict --config FILE.yaml    write its answers
                                Several --config files and options such as --trainer.max_steps 10 may follow;
                                the later one wins.
command on a list of stages:
  pipeline --config FILE.yaml   run the stages in order, and skip what is done

options:
  -h, --help                    show this text; `rto-lightning fit --help` lists every setting
  --version                     show the version
"""


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line and turns errors of the user into one line on stderr.

    Args:
        args: Arguments as typed after `rto-lightning`; None takes those of the process.

    Returns:
        The exit status: 0; 1 after a `UserError`; 2 when the configuration or command line cannot be read.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    try:
        _dispatch(arguments)
    except UserError as error:
        print(f"rto-lightning: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigurationError) else 1
    return 0


def run_stage(args: Sequence[str]) -> None:
    """Runs one stage in this process.

    Args:
        args: A command of `STAGE_COMMANDS` and its options, as on the command line.

    Raises:
        UserError: For every mistake that the user can cure, already told as one sentence.
    """
    config_files = given_config_files(args)
    check_config_files(config_files)
    from rto_lightning.lightning_cli import run

    try:
        run(args, config_files)
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

    The configuration `<stage>.yaml` is looked for beside the files in use, the last file first.
    """
    beside = (Path(name).parent / f"{error.stage}.yaml" for name in reversed(config_files))
    config = next((str(path) for path in beside if path.is_file()), f"{error.stage.upper()}_CONFIG.yaml")
    return f"{str(error).rstrip('.')}; make it first with: rto-lightning fit --config {config}"


def _dispatch(arguments: list[str]) -> None:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(USAGE, end="")
    elif command == "--version":
        from importlib.metadata import version

        print(f"rto-lightning {version('rto-lightning')}")
    elif command == "pipeline":
        from rto_lightning.pipeline import main as pipeline_main

        pipeline_main(arguments[1:])
    elif command in STAGE_COMMANDS:
        run_stage(arguments)
    else:
        known = ", ".join([*STAGE_COMMANDS, "pipeline"])
        raise ConfigurationError(f"unknown command `{command}`; choose one of {known} (--help explains them).")


if __name__ == "__main__":
    sys.exit(main())
