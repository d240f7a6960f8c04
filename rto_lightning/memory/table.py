"""Plans of memory and of communication as a person reads them, and the sentence that warns."""

from collections.abc import Sequence
from dataclasses import dataclass

from rto_lightning.memory.changes import Change
from rto_lightning.memory.plan import CostPlan, Item, MemoryPlan

WIDTH = 78
_GIB, _MIB = 2**30, 2**20


@dataclass(frozen=True)
class Rates:
    """What a device does in a second."""

    link: float = 50e9
    """Bytes that it receives from others: a link of 400 Gbit a GPU between nodes; NVLink within one has more."""
    operations: float = 400e12
    """Floating-point operations: about 40% of the bfloat16 peak of an H100."""
    memory: float = 2e12
    """Bytes that it reads from its memory: about 60% of the peak of an H100."""


def show_bytes(count: int) -> str:
    """`1.23 GiB`, `12.3 MiB`."""
    if count >= 0.995 * _GIB:
        return f"{count / _GIB:.2f} GiB"
    return f"{count / _MIB:.1f} MiB"


def plan_table(plan: MemoryPlan, device: str, available: int | None, changes: Sequence[Change] = ()) -> str:
    """The plan in lines of at most 80 columns, for short model names.

    Args:
        plan: the plan.
        device: such as `cuda`.
        available: bytes that the device has for it; None if that is not known.
        changes: what would take less, shown if the plan does not fit.
    """
    lines = [f"Memory plan of {plan.stage} on {device}, {plan.precision}: {plan.model}"]
    if plan.processes > 1 or plan.sharing == "fsdp":
        lines.append(f"one of {plan.processes} processes, {plan.sharing}; rows are those of one process")
    lines += [f"{plan.prompt_tokens} prompt + {plan.response_tokens} response tokens; {plan.batch}", ""]
    lines += _block("weights", plan.weights)
    lines += _block("optimizer state", plan.optimizers)
    if plan.buckets:
        lines.append(_row("gradient buckets of DDP", plan.buckets))
    if plan.process:
        lines.append(_row("process before loading (measured)", plan.process))
    lines += [_row("resident", plan.resident), ""]
    for phase in plan.phases:
        lines += _block(f"+ {phase.name}", phase.items, phase.bytes)
    lines += ["", _row(f"peak (resident + {plan.peak_phase.name})", plan.peak)]
    if plan.host:
        lines.append(_row("in the memory of the host, for this process", plan.host))
    if available is not None:
        lines.append(_row("available", available))
    elif device == "cuda":
        lines.append(f"{'available':<{WIDTH - 12}}{'no GPU here':>12}")
    if changes:
        lines += ["", "peak with one change"]
        lines += [_row(f"  {change.setting}", change.peak) for change in changes]
    return "\n".join(lines) + "\n"


def cost_table(costs: CostPlan, rates: Rates = Rates()) -> str:
    """What a process communicates and computes in an iteration, with the seconds at some rates.

    Args:
        costs: of the plan.
        rates: of the devices.
    """
    lines = [_costs("communication a process and iteration", "bytes", f"s at {rates.link / 1e9:g} GB/s")]
    phase = ""
    for transfer in costs.transfers:
        if transfer.phase != phase:
            phase = transfer.phase
            lines.append(f"  {phase}")
        received = show_bytes(transfer.bytes), _seconds(transfer.bytes / rates.link)
        lines.append(_costs(f"    {transfer.operation}", *received))
    total = sum(transfer.bytes for transfer in costs.transfers)
    lines += [_costs("  all", show_bytes(total), _seconds(total / rates.link)), ""]
    rate = f"s at {rates.operations / 1e12:g} TFLOP/s"
    lines.append(_costs("computation a process and iteration", "TFLOP", rate))
    for made in costs.computations:
        seconds = _seconds(made.operations / rates.operations)
        lines.append(_costs(f"  {made.phase}", f"{made.operations / 1e12:,.0f}", seconds))
    for made in costs.computations:
        if made.read_bytes:
            name = f"  {made.phase}: reads of decoding, at {rates.memory / 1e12:g} TB/s"
            lines.append(_costs(name, show_bytes(made.read_bytes), _seconds(made.read_bytes / rates.memory)))
    return "\n".join(lines) + "\n"


def warning(plan: MemoryPlan, available: int, changes: Sequence[Change]) -> str:
    """One sentence: that a plan does not fit, and what to change."""
    sentence = f"the memory plan takes {show_bytes(plan.peak)}, but {show_bytes(available)} are available"
    alone = [change for change in changes if change.setting != "all of these"]
    if not alone:
        return f"{sentence}; use a smaller model or a larger device."
    fits = [change for change in alone if change.peak <= available]
    proposed = ", or ".join(f"{change.setting} ({show_bytes(change.peak)})" for change in (fits or alone)[:3])
    together = next((change for change in changes if change.setting == "all of these"), None)
    if not fits and together is not None:
        proposed += f"; all together {show_bytes(together.peak)}"
    return f"{sentence}; set {proposed}. `rto-lightning plan` shows where it goes."


def _block(title: str, items: Sequence[Item], total: int | None = None) -> list[str]:
    total = sum(item.bytes for item in items) if total is None else total
    if len(items) == 1 and items[0].name != "base":
        return [_row(f"{title}: {items[0].name}", total)]
    return [_row(title, total), *(f"{'':4}{item.name:<44}{show_bytes(item.bytes):>12}" for item in items)]


def _costs(name: str, count: str, seconds: str) -> str:
    return f"{name:<{WIDTH - 32}}{count:>14}{seconds:>18}"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.1f}" if seconds >= 0.1 else "under 0.1"


def _row(name: str, count: int) -> str:
    return f"{name:<{WIDTH - 12}}{show_bytes(count):>12}"
