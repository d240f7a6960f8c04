"""Errors that a user can cause and can cure.

Each is one sentence that names the file, row, key or value at fault and says what to do about it. The
command prints that sentence and exits with status 1; every other exception is a defect of ours and keeps its
traceback.
"""


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
