"""Errors that a user can cause and can cure.

Each is one sentence that names the file, row, key or value at fault and says what to do about it. The
command prints that sentence and exits with its status; every other exception is a defect of ours and keeps its
traceback.
"""

import signal
from collections.abc import Iterable
from pickle import UnpicklingError


class UserError(Exception):
    """A mistake in the user's settings or data, told in one sentence."""

    exit_status = 1
    """Of the command: 2 for what cannot be read or compared, such as a command line, a configuration, answer files."""


class MissingInputError(UserError):
    """An input that an earlier stage makes is not there.

    Args:
        message: One sentence, as for `UserError`.
        stage: The stage that makes the input: `sft`, `dpo`, `reward_model` or `rto`.
    """

    def __init__(self, message: str, stage: str) -> None:
        super().__init__(message)
        self.stage = stage


class Stopped(BaseException):
    """A signal has ended the run in order. It is no Exception: `except Exception` of a reward function lets it pass.

    Args:
        number: Of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.saved: str | None = None
        """The checkpoint that was saved for it."""
        self.step = 0
        """Optimizer steps (for RTO: iterations) that this checkpoint has behind it."""

    @property
    def exit_status(self) -> int:
        """As shells give it for a process that the signal has ended."""
        return 128 + self.number


def user_error_within(error: BaseException) -> UserError | None:
    """The first UserError among an error and those that led to it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__ or cause.__context__
    return cause


def check_settings(
    where: str, settings: object, positive: Iterable[str] = (), not_negative: Iterable[str] = ()
) -> None:
    """Check numbers of a settings dataclass; None is always allowed.

    Args:
        where: The key under which the settings stand in a configuration.
        settings: The dataclass.
        positive: Fields that must be above 0.
        not_negative: Fields that must be at least 0.

    Raises:
        UserError: If one is out of range.
    """
    for names, above, words in ((positive, True, "above 0"), (not_negative, False, "to 0 or more")):
        for name in names:
            value = getattr(settings, name)
            if value is not None and not (value > 0 if above else value >= 0):
                raise UserError(f"{where}.{name} is {value}; set it {words}.")


def first_line(error: BaseException) -> str:
    """What an error of a library says, without details and full stop."""
    if isinstance(error, UnpicklingError) and str(error).startswith("Weights only load failed"):
        return "it holds more than tensors and plain values, which could run code"  # torch says how to run it
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
