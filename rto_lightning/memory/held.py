"""What the weights of a loaded backbone take, by role: the figures that a plan foretells."""

from collections.abc import Iterator

from torch import Tensor

from rto_lightning.backbone import PolicyBackbone
from rto_lightning.memory.live_bytes import tensor_bytes
from rto_lightning.memory.shapes import BASE, model_tensors


def weight_tensors(backbone: PolicyBackbone) -> dict[str, list[Tensor]]:
    """The weights of the base model, as `base`, and of each role what it has of its own.

    That is its adapter, or its model, and its head; a role that is the base itself has no entry. Of 4-bit weights the
    packed bytes are there, and their scales. They are the tensors themselves, and change as the run changes them.

    Args:
        backbone: with its roles.
    """
    tensors = {name: list(_own(backbone, name)) for name in backbone.roles}
    if BASE in backbone.models:
        adapters = {id(weight) for weight in backbone.adapters.all_parameters()}
        base = [tensor for tensor in model_tensors(backbone.models[BASE]) if id(tensor) not in adapters]
        tensors = {BASE: base, **tensors}
    return {name: weights for name, weights in tensors.items() if weights}


def weight_bytes(backbone: PolicyBackbone) -> dict[str, int]:
    """Bytes of each entry of :func:`weight_tensors`. Neither gradients nor optimizer states count."""
    return {name: tensor_bytes(weights) for name, weights in weight_tensors(backbone).items()}


def _own(backbone: PolicyBackbone, name: str) -> Iterator[Tensor]:
    role = backbone.roles[name]
    if role.body_of is None and role.adapter is not None:
        yield from backbone.adapters.parameters(role.adapter)
    elif role.body_of is None and role.model != BASE:
        yield from backbone.models[role.model].parameters()
    if name in backbone.heads:
        yield from backbone.heads[name].parameters()
