"""What a process holds of models that FSDP2 shards, and what it gathers of them to compute.

`rto_lightning.backbone.sharding` groups the weights of each decoder layer, and the rest of a model: embeddings, last
norm, output layer. A layer is freed after its forward and gathered again for its backward, while the next one is
gathered already; the rest stays until its pass has ended. Adapters, heads and buffers are whole on each process.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rto_lightning.backbone.sharding import decoder_layers
from rto_lightning.memory.live_bytes import tensor_bytes
from rto_lightning.memory.shapes import BASE, StageShapes
from rto_lightning.memory.workload import Workload

_LAYERS_AT_A_TIME = 2
"""The one that computes and the next; of gradients the last two, since one is summed while the other is computed."""


class ModelGroups(NamedTuple):
    """The weights of one model without adapters, as `fully_shard` groups them."""

    layers: list[list[nn.Parameter]]
    """Of each decoder layer."""
    root: list[nn.Parameter]
    """Of all the rest."""

    @property
    def weights(self) -> list[nn.Parameter]:
        """All of them."""
        return [*(weight for layer in self.layers for weight in layer), *self.root]


def model_groups(shapes: StageShapes, role: str) -> ModelGroups:
    """The weights of the model that plays a role, or of the base; an outside model is no decoder and all root."""
    model = shapes.model(role)
    if role in shapes.outside:
        return ModelGroups([], list(model.parameters()))
    adapters: set[int] = set()
    if model is shapes.models.get(BASE):
        adapters = {id(weight) for name in shapes.bank.names for weight in shapes.bank.parameters(name)}
    layers = [[w for w in layer.parameters() if id(w) not in adapters] for layer in decoder_layers(model)]
    known = adapters | {id(weight) for layer in layers for weight in layer}
    return ModelGroups(layers, [weight for weight in model.parameters() if id(weight) not in known])


def shard_bytes(weights: Iterable[Tensor], processes: int) -> int:
    """Bytes that the first process holds of weights whose rows all processes share, as `torch.chunk` deals them."""
    return sum(-(-len(weight) // processes) * (weight.nbytes // len(weight)) for weight in weights)


def gathers_in_16_bits(workload: Workload) -> bool:
    """Whether weights of 32 bits are gathered as bfloat16, as `FullyShardedStrategy` has it."""
    return workload.precision == "bf16-mixed" and workload.backbone.mode == "full"


def gathered_bytes(weights: Iterable[Tensor], in_16_bits: bool) -> int:
    """Bytes of whole weights in the data type that they are computed in."""
    return sum(weight.numel() * _gathered_size(weight, in_16_bits) for weight in weights)


def reduced_bytes(weights: Iterable[Tensor]) -> int:
    """Bytes of gradients while they are summed over processes: in 32 bits at least."""
    return sum(weight.numel() * max(4, weight.element_size()) for weight in weights)


def gathered_at_a_time(groups: ModelGroups, in_16_bits: bool) -> int:
    """The most that a forward or backward has gathered at a time."""
    layers = sorted((gathered_bytes(layer, in_16_bits) for layer in groups.layers), reverse=True)
    return sum(layers[:_LAYERS_AT_A_TIME]) + gathered_bytes(groups.root, in_16_bits)


def gradients_at_a_time(groups: ModelGroups, in_16_bits: bool) -> int:
    """The most that a backward has of whole gradients, and of the copies in which they are summed over processes.

    The gradients of the rest are summed together, at the end of the backward, and the first of them is there from its
    beginning.
    """
    layers = [gathered_bytes(layer, in_16_bits) + reduced_bytes(layer) for layer in groups.layers]
    last = sum(sorted(layers, reverse=True)[:_LAYERS_AT_A_TIME])
    return gathered_bytes(groups.root, in_16_bits) + max(last, reduced_bytes(groups.root))


class Held(NamedTuple):
    """Bytes that a process has of some weights."""

    device: int
    """In the memory of its device."""
    host: int = 0
    """In that of the host."""


def held_of_role(shapes: StageShapes, role: str) -> Held:
    """A role's own weights: a share of a model, the whole of an adapter and of a head."""
    weights = shapes.parameters(role)
    if not shapes.parallelism.sharded or shapes.roles[role].kind != "model":
        return Held(tensor_bytes(weights))
    sharded = model_groups(shapes, role).weights
    ids = {id(weight) for weight in sharded}
    whole = tensor_bytes(weight for weight in weights if id(weight) not in ids)
    return _placed(shapes, shard_bytes(sharded, shapes.parallelism.processes), whole)


def held_of_base(shapes: StageShapes) -> Held:
    """The base model: a share of its weights, and every buffer."""
    if BASE not in shapes.models or not shapes.parallelism.sharded:
        return Held(shapes.base_bytes())
    sharded = model_groups(shapes, BASE).weights
    whole = shapes.base_bytes() - tensor_bytes(sharded)
    return _placed(shapes, shard_bytes(sharded, shapes.parallelism.processes), whole)


def held_of_copied_base(shapes: StageShapes) -> int:
    """Bytes of the base model on the device where a phase loads it beside a model that is trained, of its shape."""
    parallelism = shapes.parallelism
    trained = next(role.name for role in shapes.roles.values() if role.kind == "model" and role.trained)
    weights = model_groups(shapes, trained).weights
    if parallelism.offloads:
        return 0
    held = shard_bytes(weights, parallelism.processes) if parallelism.sharded else tensor_bytes(weights)
    return held * shapes.settings.frozen_dtype.itemsize // shapes.settings.trained_dtype.itemsize


def cast_sharded_models(shapes: StageShapes) -> None:
    """Put bfloat16 weights, as they are gathered, in the place of those that processes hold.

    Mixed precision then makes no 16-bit copy of them in a forward, as it does of weights of 32 bits.
    """
    for name in shapes.models.keys() - shapes.outside:
        cast = {id(weight): _as_gathered(weight, shapes) for weight in model_groups(shapes, name).weights}
        module: Any
        for module in shapes.models[name].modules():
            for key, weight in module._parameters.items():
                if weight is not None:
                    module._parameters[key] = cast.get(id(weight), weight)


def _placed(shapes: StageShapes, share: int, whole: int) -> Held:
    return Held(whole, share) if shapes.parallelism.offloads else Held(whole + share)


def _as_gathered(weight: nn.Parameter, shapes: StageShapes) -> nn.Parameter:
    if _gathered_size(weight, True) == weight.element_size():
        return weight
    with shapes.fake:
        made = nn.Parameter(torch.empty(weight.shape, dtype=torch.bfloat16), requires_grad=weight.requires_grad)
        if weight.requires_grad:
            made.grad = torch.empty_like(made)
    return made


def _gathered_size(weight: Tensor, in_16_bits: bool) -> int:
    """Bytes of an element."""
    return min(2, weight.element_size()) if in_16_bits else weight.element_size()
