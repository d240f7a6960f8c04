"""The memory plan of a stage: what its weights take, what each phase takes on top, and the sum."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rto_lightning.memory.dry_run import Kind, Quantity, dry_run
from rto_lightning.memory.shapes import BASE, layers_are_alike, layers_of, read_config
from rto_lightning.memory.workload import Forward, Phase, Rollout, Workload

_DEPTHS = (2, 3)
"""Layers of the two dry runs from which those of a deep model follow."""
_ID_BYTES, _TOKEN_BYTES = 16, 49
"""For each token of an iteration its id and mask, and for each response token twelve float32 and a mask."""


@dataclass(frozen=True)
class Item:
    """One summand."""

    name: str
    """What it is, such as `base`, `policy` or `KV cache`."""
    bytes: int
    """How much."""


@dataclass(frozen=True)
class PhasePlan:
    """One phase, beside what is there all the time."""

    name: str
    """Such as `rollout`, `scoring` or `update of policy`."""
    items: tuple[Item, ...]
    """What is added in it."""

    @property
    def bytes(self) -> int:
        """Their sum."""
        return sum(item.bytes for item in self.items)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one device. Data, fragmentation and the workspaces of kernels come on top."""

    stage: str
    """Such as `rto`."""
    model: str
    """The base model."""
    precision: str
    """The trainer's."""
    prompt_tokens: int
    """The longest prompt."""
    response_tokens: int
    """The longest response."""
    batch: str
    """The batch sizes, in words."""
    weights: tuple[Item, ...]
    """Base, outside models and roles."""
    optimizers: tuple[Item, ...]
    """State by role."""
    copies: int
    """16-bit copies of trained weights, which mixed precision keeps during an iteration."""
    process: int
    """Resident before anything is loaded: libraries and data. 0 on a GPU."""
    phases: tuple[PhasePlan, ...]
    """In the order of a run."""

    @property
    def resident(self) -> int:
        """What is there in every phase."""
        return self.process + self.copies + sum(item.bytes for item in (*self.weights, *self.optimizers))

    @property
    def peak_phase(self) -> PhasePlan:
        """The phase that takes the most."""
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def peak(self) -> int:
        """The sum: what is there in every phase, and the phase that takes the most."""
        return self.resident + self.peak_phase.bytes

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the fields, in bytes, and the sums."""
        phases = [{"name": phase.name, "bytes": phase.bytes, "items": _named(phase.items)} for phase in self.phases]
        lists = {"weights": _named(self.weights), "optimizers": _named(self.optimizers), "phases": phases}
        return {**asdict(self), **lists, "resident": self.resident, "peak": self.peak}


def plan_memory(workload: Workload, process: int = 0, foreach: bool = False) -> MemoryPlan:
    """Plan the memory of a stage.

    Deep models of like layers are tried with two and with three layers, from which the bytes of all of them follow.

    Args:
        workload: the stage.
        process: bytes that are resident before anything is loaded, on the same device.
        foreach: whether torch's optimizers step all weights at once, as they do on a GPU.

    Raises:
        UserError: if the configuration of a model cannot be read.
    """
    sizes = _sizes(workload, foreach)

    def items(kind: Kind) -> tuple[Item, ...]:
        return tuple(Item(key.role, size) for key, size in sizes.items() if key.kind == kind and size > 0)

    # Each role is read in several parts, but its weights are copied once.
    copied = {key.role: size for key, size in sizes.items() if key.kind == "16-bit copies"}
    return MemoryPlan(
        stage=workload.stage,
        model=workload.backbone.model,
        precision=workload.precision,
        prompt_tokens=workload.prompt_tokens,
        response_tokens=workload.response_tokens,
        batch=workload.batch,
        weights=items("weights"),
        optimizers=items("optimizer"),
        copies=sum(copied.values()),
        process=process,
        phases=tuple(_phase(workload, phase, sizes) for phase in workload.phases),
    )


def _phase(workload: Workload, phase: Phase, sizes: dict[Quantity, int]) -> PhasePlan:
    def total(kind: Kind, roles: Sequence[str]) -> int:
        return sum(sizes[Quantity(kind, role)] for role in roles)

    items = [Item("gradients", total("gradients", phase.trains))]
    if phase.copies_base:
        items.append(Item("base", sizes[Quantity("weights", BASE)]))
    computed = 0
    for part in phase.parts:
        if isinstance(part, Forward):
            computed = max(computed, sizes[Quantity("activations", part.role, part)])
            continue
        cache, prefill, decoding = (
            sizes[Quantity(kind, part.role, part)] for kind in ("KV cache", "prefill", "decoding")
        )
        items.append(Item("KV cache", cache))
        computed = max(prefill - cache, decoding)
    updates = any(isinstance(part, Forward) and part.backward for part in phase.parts)
    step = max((sizes[Quantity("optimizer step", role)] for role in phase.trains), default=0) if updates else 0
    items.append(Item("activations", computed) if computed >= step else Item("optimizer step", step))
    if not any(isinstance(part, Rollout) for part in phase.parts):
        rows, tokens = workload.samples, workload.response_tokens
        items.append(Item("trajectory", rows * (workload.tokens * _ID_BYTES + tokens * _TOKEN_BYTES)))
    return PhasePlan(phase.name, tuple(item for item in items if item.bytes > 0))


def _sizes(workload: Workload, foreach: bool) -> dict[Quantity, int]:
    """Bytes of everything at full depth."""
    sources = {BASE: workload.backbone.model}
    sources |= {role.name: role.source for role in workload.roles if role.source is not None}
    sources |= {outside.source: outside.source for outside in workload.outside}
    base = workload.backbone
    configs = {name: read_config(source, None if name == source else base) for name, source in sources.items()}
    layers = {name: layers_of(config) for name, config in configs.items()}
    two, three = _DEPTHS
    if max(layers.values()) <= three or not all(layers_are_alike(config) for config in configs.values()):
        return dry_run(workload, None, foreach)
    few, more = dry_run(workload, two, foreach), dry_run(workload, three, foreach)
    depths = {key: layers.get(key.role, layers[BASE]) for key in few}
    return {key: few[key] + (depths[key] - two) * (more[key] - few[key]) for key in few}


def _named(items: Sequence[Item]) -> dict[str, int]:
    return {item.name: item.bytes for item in items}
