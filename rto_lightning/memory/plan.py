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
    process: int
    """Resident before anything is loaded: libraries and data. 0 on a GPU."""
    phases: tuple[PhasePlan, ...]
    """In the order of a run."""

    @property
    def resident(self) -> int:
        """What is there in every phase."""
        return self.process + sum(item.bytes for item in (*self.weights, *self.optimizers))

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

    Frozen models of many like layers are tried with two and with three of them, from which the bytes of all follow.

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

    return MemoryPlan(
        stage=workload.stage,
        model=workload.backbone.model,
        precision=workload.precision,
        prompt_tokens=workload.prompt_tokens,
        response_tokens=workload.response_tokens,
        batch=workload.batch,
        weights=items("weights"),
        optimizers=items("optimizer"),
        process=process,
        phases=tuple(_phase(workload, phase, sizes) for phase in workload.phases),
    )


def _phase(workload: Workload, phase: Phase, sizes: dict[Quantity, int]) -> PhasePlan:
    def total(kind: Kind, roles: Sequence[str]) -> int:
        return sum(sizes[Quantity(kind, role)] for role in roles)

    items = [Item("gradients", total("gradients", phase.trains))]
    if phase.copies_base:
        items.append(Item("base", sizes[Quantity("weights", BASE)]))
    computed = [_computed(part, sizes) for part in phase.parts]
    if any(isinstance(part, Forward) and part.backward for part in phase.parts):
        computed += [(Item("optimizer step", sizes[Quantity("optimizer step", role)]),) for role in phase.trains]
    items += max(computed, key=lambda made: sum(item.bytes for item in made))
    if not any(isinstance(part, Rollout) for part in phase.parts):
        rows, tokens = workload.samples, workload.response_tokens
        items.append(Item("trajectory", rows * (workload.tokens * _ID_BYTES + tokens * _TOKEN_BYTES)))
    return PhasePlan(phase.name, tuple(item for item in items if item.bytes > 0))


def _computed(part: Forward | Rollout, sizes: dict[Quantity, int]) -> tuple[Item, ...]:
    """The most that is there at a time in one part."""
    if isinstance(part, Forward):
        return (Item("activations", sizes[Quantity("activations", part.role, part)]),)
    cache, prefill, decoding = (sizes[Quantity(kind, part.role, part)] for kind in ("KV cache", "prefill", "decoding"))
    return Item("KV cache", cache), Item("activations", max(prefill - cache, decoding))


def _sizes(workload: Workload, foreach: bool) -> dict[Quantity, int]:
    """Bytes of everything at full depth."""
    base = workload.backbone
    outside = {model.source for model in workload.outside}
    sources = {BASE: base.model} | {source: source for source in outside}
    sources |= {role.name: role.source for role in workload.roles if role.source is not None}
    configs = {name: read_config(source, None if name in outside else base) for name, source in sources.items()}
    layers = {name: layers_of(config) for name, config in configs.items()}
    two, three = _DEPTHS
    alike = (layers_are_alike(config, None if name in outside else base) for name, config in configs.items())
    if max(layers.values()) <= three or _trains_models(workload) or not all(alike):
        return dry_run(workload, None, foreach)
    few, more = dry_run(workload, two, foreach), dry_run(workload, three, foreach)
    depths = {key: layers.get(key.role, layers[BASE]) for key in few}
    return {key: few[key] + (depths[key] - two) * (more[key] - few[key]) for key in few}


def _trains_models(workload: Workload) -> bool:
    """Whether every weight of a model is trained, so that its peak need not grow evenly with its layers.

    Of few layers the backward pass takes the most at its end, where the gradient of the embedding is made, which is as
    large in a model of many layers; those take the most at its beginning.
    """
    return any(role.trained and role.kind == "model" for role in workload.roles)


def _named(items: Sequence[Item]) -> dict[str, int]:
    return {item.name: item.bytes for item in items}
