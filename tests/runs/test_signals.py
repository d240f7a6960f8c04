import os
import signal

import pytest

from rto_lightning.errors import Stopped
from rto_lightning.runs.signals import StopSignals, may_be_abandoned, stop_signals


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def test_outside_of_steps_a_signal_ends_the_run_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as stopped, StopSignals():
        send()
        raise AssertionError("not stopped")
    assert stopped.value.exit_status == 143 and str(stopped.value) == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before and stop_signals() is None


def test_within_a_step_it_waits_until_it_is_asked_for(capfd):
    with StopSignals() as signals:
        signals.deferred = True
        signals.stop_if_asked()
        send()
        send()
        with pytest.raises(Stopped, match="SIGTERM"):
            signals.stop_if_asked()
    assert capfd.readouterr().err.count("stopping after the present step") == 1


def test_the_second_interrupt_does_not_wait():
    with StopSignals() as signals:
        signals.deferred = True
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_work_that_changes_nothing_is_abandoned():
    done = []
    with StopSignals() as signals:
        signals.deferred = True
        with pytest.raises(Stopped), may_be_abandoned():
            done.append("begun")
            send()
            done.append("finished")
        assert signals.deferred
    assert done == ["begun"]


def test_a_signal_before_such_work_ends_the_run_before_it():
    with StopSignals() as signals:
        signals.deferred = True
        send()
        with pytest.raises(Stopped), may_be_abandoned():
            raise AssertionError("not stopped")


def test_after_such_work_signals_wait_again():
    with StopSignals() as signals:
        signals.deferred = True
        with may_be_abandoned():
            pass
        send()
        with pytest.raises(Stopped):
            signals.stop_if_asked()


def test_nobody_listens_nobody_is_asked():
    with may_be_abandoned():
        assert stop_signals() is None


def test_a_user_function_does_not_swallow_it():
    with pytest.raises(Stopped), StopSignals():
        try:
            send()
        except Exception:
            raise AssertionError("swallowed") from None


def test_slurm_asks_by_another_signal(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(Stopped, match="SIGUSR1"), StopSignals():
        send(signal.SIGUSR1)


def test_a_child_of_the_process_is_not_stopped_by_interrupts():
    with StopSignals():
        child = os.fork()
        if child == 0:
            send(signal.SIGINT)
            send(signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143


def test_several_processes_that_do_not_train_yet_are_ended_at_once():
    """As `signal` has it by itself: a process that waits for another one within torch calls no handler."""
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals(processes=2) as signals:
        assert signal.getsignal(signal.SIGTERM) is before
        signals.listen()
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
