"""How much memory a stage takes, planned from its settings alone and measured; and what its processes communicate."""

from rto_lightning.memory.changes import Change, proposed_changes
from rto_lightning.memory.held import weight_bytes, weight_tensors
from rto_lightning.memory.measure import available_bytes, available_to_process, peak_bytes, reset_peak, resident_bytes
from rto_lightning.memory.parallelism import Parallelism, planned_parallelism, running_parallelism
from rto_lightning.memory.plan import CostPlan, MemoryPlan, plan_costs, plan_memory
from rto_lightning.memory.stages import workload_of
from rto_lightning.memory.table import Rates, cost_table, plan_table, show_bytes, warning

__all__ = [
    "Change",
    "CostPlan",
    "MemoryPlan",
    "Parallelism",
    "Rates",
    "available_bytes",
    "available_to_process",
    "cost_table",
    "peak_bytes",
    "plan_costs",
    "plan_memory",
    "plan_table",
    "planned_parallelism",
    "proposed_changes",
    "reset_peak",
    "resident_bytes",
    "running_parallelism",
    "show_bytes",
    "warning",
    "weight_bytes",
    "weight_tensors",
    "workload_of",
]
