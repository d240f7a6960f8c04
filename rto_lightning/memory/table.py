"""A memory plan as a person reads it, and the sentence that warns."""

from collections.abc import Sequence

from rto_lightning.memory.changes import Change
from rto_lightning.memory.plan import Item, MemoryPlan

WIDTH = 78
_GIB, _MIB = 2**30, 2**20


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
    lines = [
        f"Memory plan of {plan.stage} on {device}, {plan.precision}: {plan.model}",
        f"{plan.prompt_tokens} prompt + {plan.response_tokens} response tokens; {plan.batch}",
        "",
    ]
    lines += _block("weights", plan.weights)
    lines += _block("optimizer state", plan.optimizers)
    if plan.process:
        lines.append(_row("process before loading (measured)", plan.process))
    lines += [_row("resident", plan.resident), ""]
    for phase in plan.phases:
        lines += _block(f"+ {phase.name}", phase.items, phase.bytes)
    lines += ["", _row(f"peak (resident + {plan.peak_phase.name})", plan.peak)]
    if available is not None:
        lines.append(_row("available", available))
    elif device == "cuda":
        lines.append(f"{'available':<{WIDTH - 12}}{'no GPU here':>12}")
    if changes:
        lines += ["", "peak with one change"]
        lines += [_row(f"  {change.setting}", change.peak) for change in changes]
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


def _row(name: str, count: int) -> str:
    return f"{name:<{WIDTH - 12}}{show_bytes(count):>12}"
