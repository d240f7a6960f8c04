"""How much memory a stage takes: planned from its settings alone, and measured."""

from rto_lightning.memory.changes import Change, proposed_changes
from rto_lightning.memory.measure import available_bytes, peak_bytes, reset_peak, resident_bytes
from rto_lightning.memory.plan import MemoryPlan, plan_memory
from rto_lightning.memory.stages import workload_of
from rto_lightning.memory.table import plan_table, show_bytes, warning

__all__ = [
    "Change",
    "MemoryPlan",
    "available_bytes",
    "peak_bytes",
    "plan_memory",
    "plan_table",
    "proposed_changes",
    "reset_peak",
    "resident_bytes",
    "show_bytes",
    "warning",
    "workload_of",
]
