"""What a device has left, and the most that this process has taken of it."""

import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

from rto_lightning.memory.parallelism import Parallelism

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # see proc_pid_clear_refs(5)
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", ("inactive_file", "active_file")),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
)
"""Limit, use, and what the `memory.stat` beside them calls cached files, of versions 2 and 1."""


def resident_bytes() -> int:
    """Bytes of this process in the machine's memory; where the system does not tell, the most there ever were."""
    return _status("VmRSS") or _largest_resident_bytes()


def peak_bytes(device: torch.device) -> int:
    """The most that this process has taken of a device since :func:`reset_peak`.

    On a GPU what tensors took, on a CPU the resident memory of the whole process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") or _largest_resident_bytes()


def reset_peak(device: torch.device) -> None:
    """Forget the peak so far; where the system does not allow that, it goes on from the start of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            _CLEAR.write_text(_RESET_PEAK)


def available_bytes(device: torch.device) -> int | None:
    """Bytes of a device that this process can have, with those it has now; None where the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device)
    if device.type != "cpu":
        return None
    free_bytes = _machine_free_bytes()
    limits = [room for room in (free_bytes, _cgroup_free_bytes()) if room is not None]
    return min(limits) + resident_bytes() if limits else None


def available_to_process(device: torch.device, parallelism: Parallelism) -> int | None:
    """As :func:`available_bytes`; the processes of a machine share its memory, but not its GPUs."""
    available = available_bytes(device)
    if available is None or device.type != "cpu":
        return available
    return available // (parallelism.processes // parallelism.nodes)


def _machine_free_bytes() -> int | None:
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _cgroup_free_bytes() -> int | None:
    """What a container's limit leaves; None without a limit."""
    for limit, used, cached in _CGROUPS:
        with suppress(OSError, ValueError):  # `max` is no number: there is no limit
            room = int(Path(limit).read_text()) - int(Path(used).read_text())
            # The kernel counts cached files as used, and drops them before it refuses memory.
            return max(0, room + _cached_bytes(Path(used).with_name("memory.stat"), cached))
    return None


def _cached_bytes(statistics: Path, names: tuple[str, ...]) -> int:
    """The sum of some lines of a `memory.stat`; 0 where there is none."""
    with suppress(OSError, ValueError):
        lines = (line.split() for line in statistics.read_text(encoding="ascii").splitlines())
        return sum(int(value) for name, value in lines if name in names)
    return 0


def _status(name: str) -> int | None:
    with suppress(OSError):
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


def _largest_resident_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
