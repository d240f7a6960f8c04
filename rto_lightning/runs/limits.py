"""How long a run lasts, as two runs compare it."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer

Limits = list[int | None]
"""Of optimizer steps (-1 for none), of epochs (-1 for none), and of seconds."""


def limits_of_settings(max_steps: int, max_epochs: int | None, max_time: Any) -> Limits:
    """The limits that a trainer with these settings has.

    Args:
        max_steps: as the trainer takes it.
        max_epochs: as the trainer takes it; None is 1000 if nothing else limits the run.
        max_time: as the trainer takes it: None, `DD:HH:MM:SS`, a dict or a timedelta.
    """
    if max_epochs is None:
        max_epochs = 1000 if max_steps == -1 and max_time is None else -1
    return [max_steps, max_epochs, None if max_time is None else _seconds(Timer(max_time))]


def limits_of(trainer: Trainer) -> Limits:
    """The limits of a trainer, that of its first Timer included."""
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    return [trainer.max_steps, trainer.max_epochs, _seconds(timers[0]) if timers else None]


def _seconds(timer: Timer) -> int | None:
    remaining = timer.time_remaining()
    return None if remaining is None else round(remaining + timer.time_elapsed())
