"""Time the phases of an iteration and show them on the progress bar."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from lightning.pytorch import Trainer

from rto_lightning.runs.signals import may_be_abandoned


class Phases:
    """Seconds of each phase of the iteration at hand."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._samples_per_second: float | None = None

    @contextmanager
    def phase(self, name: str, trainer: Trainer, changes_weights: bool = False) -> Iterator[None]:
        """Time what happens within, and tell the progress bar if it has a place for it (`show_phase`).

        Args:
            name: of the phase.
            trainer: runs the iteration.
            changes_weights: a signal then stops the run only when the iteration is complete.
        """
        show_phase = getattr(trainer.progress_bar_callback, "show_phase", None)
        if show_phase is not None:
            show_phase(name, self._samples_per_second)
        start = time.perf_counter()
        with nullcontext() if changes_weights else may_be_abandoned():
            yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # else a phase would end before its kernels do
        self.seconds[name] = time.perf_counter() - start

    def finish(self, samples: int) -> dict[str, float]:
        """Metrics of the iteration: seconds of each phase and of all, and samples a second."""
        total = sum(self.seconds.values())
        self._samples_per_second = samples / total
        metrics = {f"seconds/{name}": seconds for name, seconds in self.seconds.items()}
        self.seconds = {}
        return {**metrics, "seconds/iteration": total, "samples_per_second": self._samples_per_second}
