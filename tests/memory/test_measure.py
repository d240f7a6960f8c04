import sys

import pytest
import torch

from rto_lightning.memory import available_bytes, measure, peak_bytes, reset_peak, resident_bytes

CPU = torch.device("cpu")
MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux resets the peak")
def test_the_peak_is_what_the_process_took_since_the_reset():
    reset_peak(CPU)
    before = resident_bytes()
    assert before <= peak_bytes(CPU) < before + 64 * MIB
    table = torch.ones(64 * MIB)
    taken = peak_bytes(CPU) - before
    assert 0.9 < taken / table.nbytes < 1.2
    del table
    assert peak_bytes(CPU) - before > 0.9 * taken
    reset_peak(CPU)
    assert peak_bytes(CPU) - before < taken / 2


def test_what_is_available_holds_the_process_and_more():
    available = available_bytes(CPU)
    assert available is None or available > resident_bytes()
    assert available_bytes(torch.device("meta")) is None


def test_the_limit_of_a_container_counts(tmp_path, monkeypatch):
    limit, used = tmp_path / "max", tmp_path / "current"
    monkeypatch.setattr(measure, "_CGROUPS", [(str(limit), str(used))])
    without = available_bytes(CPU)
    used.write_text(f"{90 * MIB}\n")
    limit.write_text("max\n")
    assert available_bytes(CPU) == pytest.approx(without, rel=0.2)
    limit.write_text(f"{100 * MIB}\n")
    assert available_bytes(CPU) == pytest.approx(resident_bytes() + 10 * MIB, rel=0.1)


def test_another_system_tells_the_largest_there_ever_was(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "_STATUS", tmp_path / "none")
    monkeypatch.setattr(measure, "_CLEAR", tmp_path / "none" / "either")
    reset_peak(CPU)
    assert peak_bytes(CPU) == resident_bytes() > 50 * MIB
