"""Errors that a user can cause and can cure.

Each is one sentence that names the file, row, key or value at fault and says what to do about it. The
command prints that sentence and exits with status 1; every other exception is a defect of ours and keeps its
traceback.
"""

from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the user's settings or data, told in one sentence."""


class MissingInputError(UserError):
    """An input that an earlier stage makes is not there.

    Args:
        message: One sentence, as for `UserError`.
        stage: The stage that makes the input: `sft`, `dpo`, `reward_model` or `rto`.
    """

    def __init__(self, message: str, stage: str) -> None:
        super().__init__(message)
        self.stage = stage


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
