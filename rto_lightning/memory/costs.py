"""What an iteration communicates and computes, by arithmetic from how often each model is read.

Communication is counted as rings carry it: of G gathered bytes one of N processes receives (N - 1) / N * G, as many
when gradients are summed and scattered, and twice as many when every process gets the sum. Computation is two
operations a weight and token in a forward, as many in a backward for the inputs and again for trained weights, and
those of the layers once more with checkpointing; attention scores are left out. Every sequence is as long as the
settings allow.
"""

from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from rto_lightning.memory.live_bytes import tensor_bytes
from rto_lightning.memory.shapes import StageShapes
from rto_lightning.memory.sharding import gathered_bytes, gathers_in_16_bits, model_groups, reduced_bytes
from rto_lightning.memory.workload import Passes, Workload


@dataclass(frozen=True)
class Transfer:
    """Bytes that one process receives in an iteration."""

    phase: str
    """Such as `scoring`."""
    operation: str
    """Such as `all-gather of weights`."""
    bytes: int
    """How many."""


@dataclass(frozen=True)
class Computation:
    """What one process computes in an iteration."""

    phase: str
    """Such as `scoring`."""
    operations: int
    """Floating-point additions and multiplications."""
    read_bytes: int = 0
    """Weights and key-value cache that decoding reads from memory, for each token anew."""


@dataclass(frozen=True)
class ModelSize:
    """What costs follow from, of the model that plays one role."""

    layer_bytes: int
    """Of the weights of all decoder layers, in the data type in which they are gathered."""
    other_bytes: int
    """Of all other weights."""
    layer_weights: int
    """Elements of all decoder layers."""
    output_weights: int
    """Elements of the output layer."""
    trained_weights: int
    """Elements that are trained, of the model itself."""
    scattered_bytes: int
    """Of gradients of which each process gets a share of the sum."""
    summed_bytes: int
    """Of gradients whose sum every process gets."""

    def extended(self, deeper: "ModelSize", layers: int) -> "ModelSize":
        """That of a model with `layers` more, from one with one more."""
        names = (field.name for field in fields(self))
        return ModelSize(*((1 - layers) * getattr(self, name) + layers * getattr(deeper, name) for name in names))


def model_sizes(shapes: StageShapes, workload: Workload) -> dict[str, ModelSize]:
    """By role and outside model, but for heads without a model."""
    names = [*(role.name for role in workload.roles), *sorted(shapes.outside)]
    return {name: _model_size(shapes, name, gathers_in_16_bits(workload)) for name in names}


def transfers(workload: Workload, sizes: dict[str, ModelSize], table_bytes: int) -> tuple[Transfer, ...]:
    """What one process receives in an iteration, by phase and operation.

    Args:
        workload: the stage.
        sizes: by role.
        table_bytes: of what all processes know of the responses of an iteration.
    """
    parallelism, outside = workload.parallelism, {model.source for model in workload.outside}
    received: dict[tuple[str, str], int] = {}

    def add(phase: str, operation: str, count: int) -> None:
        count = count * (parallelism.processes - 1) // parallelism.processes
        if count > 0:
            received[phase, operation] = received.get((phase, operation), 0) + count

    for passes in workload.passes:
        size = sizes[passes.role]
        if parallelism.sharded and passes.role not in outside:
            add(passes.phase, "all-gather of weights", _gathered(workload, passes, size))
        if passes.steps:
            add(passes.phase, "reduce-scatter of gradients", passes.batches * size.scattered_bytes)
            add(passes.phase, "all-reduce of gradients", 2 * passes.steps * size.summed_bytes)
    add("scoring", "all-gather of responses", table_bytes)
    phases = list(dict.fromkeys(phase for phase, _ in received))
    ordered = sorted(received.items(), key=lambda item: phases.index(item[0][0]))
    return tuple(Transfer(*key, count) for key, count in ordered)


def computations(workload: Workload, sizes: dict[str, ModelSize], cache_bytes: int) -> tuple[Computation, ...]:
    """What one process computes in an iteration, by phase.

    Args:
        workload: the stage.
        sizes: by role.
        cache_bytes: of the full key-value cache of all responses that are sampled at a time.
    """
    sums: dict[str, tuple[int, int]] = {}
    for passes in workload.passes:
        size = sizes[passes.role]
        response = passes.new_tokens or workload.response_tokens
        tokens = workload.prompt_tokens + response
        layers = 2 * passes.rows * tokens * size.layer_weights
        output = 2 * passes.rows * response * size.output_weights * (passes.reading not in ("values", "score"))
        operations, read = layers + output, 0
        if passes.steps:
            operations += (1 + (size.trained_weights > 0)) * operations
            operations += layers * workload.backbone.gradient_checkpointing
        if passes.new_tokens:
            weights = size.layer_bytes * (size.layer_weights + size.output_weights) // max(1, size.layer_weights)
            filled = cache_bytes * (tokens - response // 2) // tokens
            read = passes.batches * passes.new_tokens * (weights + filled)
        before = sums.get(passes.phase, (0, 0))
        sums[passes.phase] = before[0] + operations, before[1] + read
    return tuple(Computation(phase, *both) for phase, both in sums.items())


def _gathered(workload: Workload, passes: Passes, size: ModelSize) -> int:
    """Bytes of all that is gathered of a model."""
    if not passes.rows:
        return passes.batches * size.scattered_bytes  # handed over as it is trained, in 32 bits
    layers = passes.batches
    if passes.new_tokens and not workload.parallelism.gathers_for_rollout:
        layers *= passes.new_tokens
    if passes.steps:
        layers *= 2  # a layer is freed between its forward and its backward
    return layers * size.layer_bytes + passes.batches * size.other_bytes


def _model_size(shapes: StageShapes, role: str, in_16_bits: bool) -> ModelSize:
    groups = model_groups(shapes, role)
    layers = [weight for layer in groups.layers for weight in layer]
    output = None if role in shapes.outside else shapes.model(role).get_output_embeddings()
    trained = shapes.parameters(role) if role in shapes.roles and shapes.roles[role].trained else []
    body = {id(weight) for weight in groups.weights}
    shares = shapes.parallelism.sharded and shapes.settings.mode == "full"
    return ModelSize(
        layer_bytes=gathered_bytes(layers, in_16_bits),
        other_bytes=gathered_bytes(groups.root, in_16_bits),
        layer_weights=sum(map(_elements, layers or groups.root)),
        output_weights=_elements(output.weight) if output is not None else 0,
        trained_weights=sum(weight.numel() for weight in trained if id(weight) in body),
        scattered_bytes=reduced_bytes(trained) if shares else 0,
        summed_bytes=0 if shares else tensor_bytes(trained),
    )


def _elements(weight: nn.Parameter) -> int:
    """Elements of a weight; 4-bit ones are stored two a byte."""
    state: Any = getattr(weight, "quant_state", None)
    return weight.numel() if state is None else int(state.shape.numel())
