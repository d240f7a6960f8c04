"""For all tests: no hub, one thread, a tiny model; and the table of faults at the end, whoever has counted them."""

import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also in processes that tests start, where pytest has several workers

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.faults.matrix import MATRIX

# How fast a machine is decides no test.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
torch.set_num_threads(1)  # on tensors as small as those of tests, threads wait for each other


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a tiny causal language model; not to be written to."""
    from tests.models import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Forget what an earlier test has left to modules and to processes that tests start.

    The command leaves its seed, and Lightning's launcher what it would tell other processes of a group: with these a
    run would join the group of the earlier test instead of starting its own processes.
    """
    for name in ("PL_GLOBAL_SEED", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand over what a worker of pytest-xdist has counted."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["faults"] = MATRIX.counts()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take what a worker of pytest-xdist has counted."""
    MATRIX.add(getattr(node, "workeroutput", {}).get("faults", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table of faults."""
    lines = MATRIX.table()
    if lines:
        terminalreporter.section("fault matrix")
        for line in lines:
            terminalreporter.write_line(line)
