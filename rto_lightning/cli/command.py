"""What the commands with options of their own have in common: how they begin, how they end, and options of models.

Nothing here imports torch, so that a mistake on the command line is told at once.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rto_lightning.errors import Stopped, UserError

Options = TypeVar("Options")


class TakesOptions(Protocol):
    """A parser, or a group of its options."""

    def add_argument(self, *names: str, **settings: Any) -> Any:
        """As `argparse` has it."""


def run_command(args: Sequence[str], parse: Callable[[Sequence[str]], Options], run: Callable[[Options], None]) -> None:
    """Reads the options, quiets the libraries, and runs.

    Args:
        args: as typed after the name of the command.
        parse: reads them, before anything heavy is imported.
        run: does what the command is for.

    Raises:
        UserError: as `parse` and `run` do.
        Stopped: if Ctrl-C has ended it.
        SystemExit: with the status of SIGPIPE, if nobody reads its output any more.
    """
    options = parse(args)
    from rto_lightning.cli.quiet import quiet_libraries, quiet_lightning

    quiet_libraries()
    quiet_lightning()
    try:
        run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise Stopped(signal.SIGINT) from None
    except BrokenPipeError:  # whoever read the output, such as `head`, has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None


def positive(text: str) -> int:
    """The type of an option that is a whole number above 0."""
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return int(text)


def add_device_option(parser: TakesOptions) -> None:
    """Adds `--device`."""
    parser.add_argument("--device", help="such as cpu or cuda:1 (cuda if there is one)")


def add_model_options(parser: TakesOptions, of_batch: str) -> None:
    """Adds how a saved role or a whole model is loaded, and how much it computes at a time.

    Args:
        parser: of the command, or a group of its options.
        of_batch: what `--batch_size` counts.
    """
    add_device_option(parser)
    parser.add_argument(
        "--dtype", choices=("float32", "auto"), default="float32", help="of frozen weights (float32); auto is as stored"
    )
    parser.add_argument("--base_model", metavar="NAME", help="base model of an adapter, if it is elsewhere by now")
    parser.add_argument("--batch_size", type=positive, default=16, metavar="N", help=f"{of_batch} (16)")


def make_folder(path: Path) -> None:
    """Makes the folder of `--output`, before what goes there has cost anything.

    Raises:
        UserError: if it cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {path} cannot be made ({error.strerror}); choose another.") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"--output {path} cannot be written to; choose another.")
