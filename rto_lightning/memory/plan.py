"""The memory plan of a stage: what its weights take, what each phase takes on top, and the sum."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rto_lightning.memory.costs import Computation, ModelSize, Transfer, computations, model_sizes, transfers
from rto_lightning.memory.dry_run import Kind, Quantity, dry_run
from rto_lightning.memory.parallelism import Sharing
from rto_lightning.memory.shapes import BASE, StageShapes, layers_are_alike, layers_of, read_config
from rto_lightning.memory.workload import Forward, Phase, Rollout, Workload
from rto_lightning.parallel import BUCKET_ELEMENTS

_DEPTHS = (2, 3)
"""Layers of the two dry runs from which those of a deep model follow."""
_ID_BYTES, _TOKEN_BYTES = 16, 49
"""For each token of an iteration its id and mask, and for each response token twelve float32 and a mask."""
_BUCKET_BYTES = 4 * BUCKET_ELEMENTS


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
    """Bytes of one device. Data, fragmentation and the workspaces of kernels and of communication come on top."""

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
    processes: int = 1
    """Devices, of which this is one."""
    sharing: Sharing = "none"
    """Whether they copy or share the weights."""
    buckets: int = 0
    """Buckets that DDP makes for all gradients, beside them and for good."""
    host: int = 0
    """Offloaded weights, gradients and optimizer states, in the memory of the host."""

    @property
    def resident(self) -> int:
        """What is there in every phase."""
        return self.process + self.buckets + sum(item.bytes for item in (*self.weights, *self.optimizers))

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
    """Plan the memory of one process of a stage.

    Frozen models of many like layers are tried with two and with three of them, from which the bytes of all follow.

    Args:
        workload: the stage.
        process: bytes that are resident before anything is loaded, on the same device.
        foreach: whether torch's optimizers step all weights at once, as they do on a GPU.

    Raises:
        UserError: if the configuration of a model cannot be read.
    """
    sizes = _sizes(workload, foreach)
    replicates = workload.parallelism.sharing == "ddp"

    def total(kind: Kind) -> int:
        return sum(size for key, size in sizes.items() if key.kind == kind)

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
        processes=workload.parallelism.processes,
        sharing=workload.parallelism.sharing,
        buckets=total("summed gradients") if replicates else 0,
        host=total("host"),
    )


@dataclass(frozen=True)
class CostPlan:
    """What one process communicates and computes in an iteration; of other stages than RTO, for a batch."""

    transfers: tuple[Transfer, ...]
    """Between processes."""
    computations: tuple[Computation, ...]
    """By phase."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "transfers": [asdict(transfer) for transfer in self.transfers],
            "computations": [asdict(computation) for computation in self.computations],
        }


def plan_costs(workload: Workload, plan: MemoryPlan) -> CostPlan:
    """Count what one process of a stage communicates and computes.

    Args:
        workload: the stage.
        plan: its memory, which has the size of the key-value cache.

    Raises:
        UserError: if the configuration of a model cannot be read.
    """
    sizes = _model_sizes(workload)
    items = (item for phase in plan.phases if phase.name == "rollout" for item in phase.items)
    cache = sum(item.bytes for item in items if item.name == "KV cache")
    return CostPlan(transfers(workload, sizes, _table_bytes(workload)), computations(workload, sizes, cache))


def _phase(workload: Workload, phase: Phase, sizes: dict[Quantity, int]) -> PhasePlan:
    def total(kind: Kind, roles: Sequence[str]) -> int:
        return sum(sizes[Quantity(kind, role)] for role in roles)

    items = [Item("gradients", total("gradients", phase.trains))]
    if phase.copies_base:
        items.append(Item("base", sizes[Quantity("copied base", BASE)]))
    computed = [_computed(part, sizes) for part in phase.parts]
    if any(isinstance(part, Forward) and part.backward for part in phase.parts):
        computed += [(Item("optimizer step", sizes[Quantity("optimizer step", role)]),) for role in phase.trains]
        computed.append((Item("gradients that are summed", _summed_at_a_time(workload, phase, sizes)),))
    items += max(computed, key=lambda made: sum(item.bytes for item in made))
    if not any(isinstance(part, Rollout) for part in phase.parts):
        items.append(Item("trajectory", _table_bytes(workload)))
    return PhasePlan(phase.name, tuple(item for item in items if item.bytes > 0))


def _table_bytes(workload: Workload) -> int:
    """Of what every process knows of the responses of an iteration, at most."""
    return workload.samples * (workload.tokens * _ID_BYTES + workload.response_tokens * _TOKEN_BYTES)


def _summed_at_a_time(workload: Workload, phase: Phase, sizes: dict[Quantity, int]) -> int:
    """The copy in which gradients of replicated weights are summed after a minibatch, a bucket at a time."""
    parallelism = workload.parallelism
    if parallelism.processes == 1 or not (workload.samples or parallelism.sharded):
        return 0  # DDP sums what is in its own buckets
    copies = (
        min(
            sizes[Quantity("summed gradients", role)],
            max(_BUCKET_BYTES, sizes[Quantity("largest summed gradient", role)]),
        )
        for role in phase.trains
    )
    return max(copies, default=0)


def _computed(part: Forward | Rollout, sizes: dict[Quantity, int]) -> tuple[Item, ...]:
    """The most that is there at a time in one part."""
    kinds: tuple[Kind, ...] = ("gathered weights", "gathered gradients")
    gathered = tuple(Item(kind, sizes.get(Quantity(kind, part.role, part), 0)) for kind in kinds)
    if isinstance(part, Forward):
        return *gathered, Item("activations", sizes[Quantity("activations", part.role, part)])
    cache, prefill, decoding = (sizes[Quantity(kind, part.role, part)] for kind in ("KV cache", "prefill", "decoding"))
    return *gathered, Item("KV cache", cache), Item("activations", max(prefill - cache, decoding))


def _sizes(workload: Workload, foreach: bool) -> dict[Quantity, int]:
    """Bytes of everything at full depth."""
    layers, alike = _layers(workload)
    two, three = _DEPTHS
    if max(layers.values()) <= three or _trains_models(workload) or not alike:
        return dry_run(workload, None, foreach)
    few, more = dry_run(workload, two, foreach), dry_run(workload, three, foreach)
    depths = {key: layers.get(key.role, layers[BASE]) for key in few}
    return {key: few[key] + (depths[key] - two) * (more[key] - few[key]) for key in few}


def _model_sizes(workload: Workload) -> dict[str, ModelSize]:
    """What costs follow from, at full depth."""
    layers, alike = _layers(workload)
    two, three = _DEPTHS
    if max(layers.values()) <= three or not alike:
        return model_sizes(StageShapes(workload, None), workload)
    few, more = (model_sizes(StageShapes(workload, depth), workload) for depth in _DEPTHS)
    return {name: few[name].extended(more[name], layers.get(name, layers[BASE]) - two) for name in few}


def _layers(workload: Workload) -> tuple[dict[str, int], bool]:
    """Layers of the base and of every other model, and whether those of each are alike."""
    base = workload.backbone
    outside = {model.source for model in workload.outside}
    sources = {BASE: base.model} | {source: source for source in outside}
    sources |= {role.name: role.source for role in workload.roles if role.source is not None}
    configs = {name: read_config(source, None if name in outside else base) for name, source in sources.items()}
    layers = {name: layers_of(config) for name, config in configs.items()}
    alike = all(layers_are_alike(config, None if name in outside else base) for name, config in configs.items())
    return layers, alike


def _trains_models(workload: Workload) -> bool:
    """Whether every weight of a model is trained, so that its peak need not grow evenly with its layers.

    Of few layers the backward pass takes the most at its end, where the gradient of the embedding is made, which is as
    large in a model of many layers; those take the most at its beginning.
    """
    return any(role.trained and role.kind == "model" for role in workload.roles)


def _named(items: Sequence[Item]) -> dict[str, int]:
    return {item.name: item.bytes for item in items}
