"""The `rto-lightning` command.

This file decides which command is meant and how errors are shown. What needs Lightning and torch is imported
only once it is needed, so that help, version and misspelled paths are answered at once.
"""

import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module

from rto_lightning.cli.config_errors import ConfigurationError
from rto_lightning.cli.stage import STAGE_COMMANDS, run_stage
from rto_lightning.errors import Stopped, UserError
from rto_lightning.secrets import mask_output, mask_text

OTHER_COMMANDS = ("plan", "pipeline", "export", "serve-reward", "rewards", "generate", "evaluate")
"""Each is the `main` of the module of that name here."""

USAGE = """\
usage: rto-lightning COMMAND [options]

commands on one stage (SFT, DPO, reward model or RTO, as the configuration says):
  fit --config FILE.yaml        train it; everything goes to the folder trainer.default_root_dir
  validate --config FILE.yaml   measure it on the validation data
  test --config FILE.yaml       measure it on the test data
  predict --config FILE.yaml    write its answers
                                Several --config files and options such as --trainer.max_steps 10 may follow;
                                the later one wins.
  plan --config FILE.yaml       print the memory that fit would take, from the settings and the model's config.json;
                                --json prints it for machines, --processes N spreads it over N devices that need not
                                be there, --bandwidth_gb_s X (50) is what each receives from others in a second
  export FROM TO                write a trained role as a PEFT or Hugging Face folder with a model card; FROM is the
                                folder of a stage, a role/ folder or a checkpoint; --merge adds an adapter to its base,
                                --push_to_hub USER/NAME uploads it (`rto-lightning export --help`)
  serve-reward FROM             answer over HTTP with the scores of a reward role, found as by export; for
                                model.reward_url and OpenRLHF (`rto-lightning serve-reward --help`)
  rewards --dpo ROLE            show which tokens of given responses a DPO role likes: a page, JSONL or Parquet
                                (`rto-lightning rewards --help`)
  generate FROM                 answer the questions of AlpacaEval 2 or Arena-Hard (`rto-lightning generate --help`)
  evaluate FILE ...             win rates of answer files, by a reward model, a function, a chat model or existing
                                annotations (`rto-lightning evaluate --help`)
command on a list of stages:
  pipeline --config FILE.yaml   run the stages in order, and skip what is done

options:
  -h, --help                    show this text; `rto-lightning fit --help` lists the trainer's settings,
                                `rto-lightning fit --model.help RTOModule` those of a stage
  --version                     show the version
"""


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line and turns errors of the user into one line on stderr.

    Args:
        args: Arguments as typed after `rto-lightning`; None takes those of the process.

    Returns:
        The exit status: 0; 1 after a `UserError`; 2 when the configuration or command line cannot be read; 128 and the
        number of the signal that has ended a run, such as 143 for SIGTERM.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    mask_output()
    try:
        _dispatch(arguments)
    except UserError as error:
        print(f"rto-lightning: error: {mask_text(str(error))}", file=sys.stderr)
        return error.exit_status
    except (Stopped, KeyboardInterrupt) as error:
        stop = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
        print(f"rto-lightning: {mask_text(_how_to_go_on(stop, arguments))}", file=sys.stderr)
        return stop.exit_status
    return 0


def _how_to_go_on(stop: Stopped, arguments: Sequence[str]) -> str:
    if arguments[0] not in ("fit", "pipeline"):
        return f"{stop} ended the {arguments[0]}."
    if stop.saved is None:
        return f"{stop} ended the run outside of its steps; the same command begins again or goes on."
    again = list(arguments)
    if arguments[0] == "fit":
        again = [*_without_checkpoint(arguments), "--ckpt_path", "last"]
    command = shlex.join(["rto-lightning", *again])
    return f"{stop} ended the run after step {stop.step}, saved as {stop.saved}; go on with: {command}"


def _without_checkpoint(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments without a checkpoint of another run that this one may have begun from."""
    words = iter(arguments)
    for word in words:
        if word == "--ckpt_path":
            next(words, None)
        elif not word.startswith("--ckpt_path="):
            yield word


def _dispatch(arguments: list[str]) -> None:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(USAGE, end="")
    elif command == "--version":
        from importlib.metadata import version

        print(f"rto-lightning {version('rto-lightning')}")
    elif command in STAGE_COMMANDS:
        run_stage(arguments)
    elif command in OTHER_COMMANDS:
        module = import_module(f"rto_lightning.cli.{command.replace('-', '_')}")
        module.main(arguments[1:])
    else:
        known = ", ".join([*STAGE_COMMANDS, *OTHER_COMMANDS])
        raise ConfigurationError(f"unknown command `{command}`; choose one of {known} (--help explains them).")
