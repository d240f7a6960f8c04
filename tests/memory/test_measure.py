import sys
from pathlib import Path

import pytest
import torch

from rto_lightning.memory import Parallelism, available_bytes, measure, peak_bytes, reset_peak, resident_bytes

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
    monkeypatch.setattr(measure, "_CGROUPS", [(str(limit), str(used), ("cached",))])
    without = available_bytes(CPU)
    used.write_text(f"{90 * MIB}\n")
    limit.write_text("max\n")
    assert available_bytes(CPU) == pytest.approx(without, rel=0.2)
    limit.write_text(f"{100 * MIB}\n")
    assert available_bytes(CPU) == pytest.approx(resident_bytes() + 10 * MIB, rel=0.1)


@pytest.mark.parametrize("version", [0, 1], ids=["version 2", "version 1"])
def test_a_container_drops_cached_files_for_memory(tmp_path, monkeypatch, version):
    limit, used, cached = measure._CGROUPS[version]
    names = [tmp_path / Path(name).name for name in (limit, used)]
    monkeypatch.setattr(measure, "_CGROUPS", [(str(names[0]), str(names[1]), cached)])
    names[0].write_text(f"{1000 * MIB}\n")
    names[1].write_text(f"{990 * MIB}\n")
    v2 = f"anon {300 * MIB}\nfile {690 * MIB}\ninactive_file {500 * MIB}\nactive_file {100 * MIB}\nshmem {90 * MIB}\n"
    v1 = f"inactive_file {MIB}\nactive_file {MIB}\ntotal_inactive_file {500 * MIB}\ntotal_active_file {100 * MIB}\n"
    (tmp_path / "memory.stat").write_text((v2, v1)[version])
    assert measure._cgroup_free_bytes() == 610 * MIB
    names[1].write_text(f"{1700 * MIB}\n")  # the limit was lowered
    assert measure._cgroup_free_bytes() == 0


def test_another_system_tells_the_largest_there_ever_was(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "_STATUS", tmp_path / "none")
    monkeypatch.setattr(measure, "_CLEAR", tmp_path / "none" / "either")
    reset_peak(CPU)
    assert peak_bytes(CPU) == resident_bytes() > 50 * MIB


def test_the_processes_of_a_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(measure, "available_bytes", lambda device: 100)
    four = Parallelism("ddp", processes=4, nodes=2)
    assert measure.available_to_process(CPU, four) == 50
    assert measure.available_to_process(torch.device("cuda"), four) == 100
