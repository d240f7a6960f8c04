"""Signals that ask a run to stop: where it may stop at once, and where it has to finish what it has begun.

An update of the weights is never left halfway. What changes no weight, such as a rollout, is abandoned: a resumed run
does it again, with the same draws.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rto_lightning.errors import Stopped
from rto_lightning.parallel import largest, ranks

_active: "StopSignals | None" = None


class StopSignals:
    """Within this context SIGTERM and SIGINT (Ctrl-C), and under SLURM SIGUSR1, stop the run in order.

    They raise `Stopped` at once, or at the next call of `stop_if_asked` while `deferred` is set. A second Ctrl-C raises
    KeyboardInterrupt at once. After SIGUSR1 the job is queued again, as Lightning does.

    Args:
        processes: of the run. Several wait for each other within torch, where no handler of Python's is called: until
            they train, SIGTERM ends them as it ends any program, and torchrun need not lose its patience.
    """

    def __init__(self, processes: int = 1) -> None:
        self._several = processes > 1
        self.deferred = False
        """Whether a step is on its way that must be finished first."""
        self.requested = 0
        """The signal that has come, 0 for none."""
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        global _active
        _active = self
        self._before = {number: signal.getsignal(number) for number in self._numbers()}
        self.listen()
        if self._several:
            signal.signal(signal.SIGTERM, self._before[signal.SIGTERM])
        return self

    def __exit__(self, *_: object) -> None:
        global _active
        _active = None
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def listen(self) -> None:
        """Puts the handlers in place, again where Lightning has put its own in between."""
        for number in self._numbers():
            signal.signal(number, self._handle)

    def stop_if_asked(self) -> None:
        """Raises `Stopped` if a signal has come to this process or, with several, to any; all have to call it."""
        (number,) = largest(self.requested)
        if number:
            raise Stopped(number)

    def _numbers(self) -> list[int]:
        queued = [signal.SIGUSR1] if "SLURM_JOB_ID" in os.environ else []
        return [signal.SIGTERM, signal.SIGINT, *queued]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker of a data loader, which its parent ends
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        first, self.requested = not self.requested, number
        if not self.deferred:
            self.deferred = True  # what follows is not to be interrupted again
            raise Stopped(number)
        if first:
            again = " (Ctrl-C again stops without that)" if number == signal.SIGINT else ""
            told = f"\n{signal.Signals(number).name}: stopping after the present step{again}\n"
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, told.encode())


def stop_signals() -> StopSignals | None:
    """Those that are listened to now."""
    return _active


@contextmanager
def may_be_abandoned() -> Iterator[None]:
    """Around work of a training step that changes nothing a checkpoint holds: a signal ends the run within it.

    With several processes it ends behind it, since they wait for each other.
    """
    signals = _active
    if signals is None:
        yield
        return
    before = signals.deferred
    if ranks() == 1:
        signals.stop_if_asked()
        signals.deferred = False
    try:
        yield
    finally:
        signals.deferred = before
    signals.stop_if_asked()


def queue_again() -> None:
    """Puts the SLURM job of this process back into the queue."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], check=False).returncode == 0
    except OSError:
        done = False
    if not done:
        print(f"scontrol could not queue the job {job} again; start it again by hand.", file=sys.stderr, flush=True)


def leave_signals_to_parent(worker: int) -> None:
    """For the processes of a data loader: when a whole group is told to end, the run still needs them for its step."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
