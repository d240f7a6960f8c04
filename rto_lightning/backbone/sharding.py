"""Models whose weights are spread over ranks by FSDP2 (`torch.distributed.fsdp.fully_shard`).

Each decoder layer is gathered when it is needed; embeddings, final norm and output layer, which may be tied, belong to
the model as a whole. FSDP gathers around `forward`, but roles call parts of a model: :func:`as_forward` puts that work
in the place of a forward.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from types import MethodType
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from rto_lightning.errors import UserError
from rto_lightning.parallel import rank

P = ParamSpec("P")
T = TypeVar("T")

_COMPUTE = "compute_as_forward"
_COMPUTING = "is_computing_as_forward"


@dataclass(frozen=True)
class Sharding:
    """How weights are spread."""

    mesh: DeviceMesh
    """The ranks that share them, one dimension."""
    compute_dtype: torch.dtype | None = None
    """In which weights are gathered and layers compute; None for the weights' own. Gradients are reduced in float32."""
    cpu_offload: bool = False
    """Keep shards, gradients and optimizer states in the memory of the host."""
    sum_gradients: bool = False
    """Add gradients up over ranks instead of averaging them."""

    def shard_model(self, model: PreTrainedModel, ignored: Iterable[nn.Parameter] = ()) -> None:
        """Spread a model over the ranks, in place; does nothing to one that is spread already.

        Args:
            model: on every rank the same.
            ignored: weights that stay whole on every rank, such as adapters.
        """
        if isinstance(model, FSDPModule):
            return
        options = self._options(ignored)
        for layer in decoder_layers(model):
            fully_shard(layer, **options)
        fully_shard(model, **options)
        setattr(model, _COMPUTE, MethodType(_call, model))
        register_fsdp_forward_method(model, _COMPUTE)
        setattr(model, _COMPUTING, False)
        self._set_reduction(model)

    def shard_head(self, head: nn.Module) -> None:
        """Spread a scalar head, so that an optimizer has sharded weights only."""
        if not isinstance(head, FSDPModule):
            fully_shard(head, mesh=self.mesh, offload_policy=self._offload)
            self._set_reduction(head)

    def _options(self, ignored: Iterable[nn.Parameter]) -> dict[str, Any]:
        precision = MixedPrecisionPolicy(param_dtype=self.compute_dtype, reduce_dtype=torch.float32)
        return {
            "mesh": self.mesh,
            "mp_policy": precision if self.compute_dtype is not None else MixedPrecisionPolicy(),
            "offload_policy": self._offload,
            "ignored_params": set(ignored),
        }

    @property
    def _offload(self) -> OffloadPolicy:
        return CPUOffloadPolicy() if self.cpu_offload else OffloadPolicy()

    def _set_reduction(self, module: nn.Module) -> None:
        if self.sum_gradients:
            for part in _sharded_parts(module):
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction with a factor


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of a decoder, from first to last: the largest list of modules within it."""
    decoder: nn.Module = model.get_decoder()
    lists = [list(module) for module in decoder.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda layers: sum(w.numel() for layer in layers for w in layer.parameters()), default=[])


def forward_of_role(method: Callable[Concatenate[Any, str, P], T]) -> Callable[Concatenate[Any, str, P], T]:
    """What this method of a backbone computes as a role counts as a forward of that role's model."""

    @wraps(method)
    def run(backbone: Any, name: str, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return as_forward(backbone.model_of(name), lambda: method(backbone, name, *args, **kwargs))

    return run


def as_forward(model: nn.Module, function: Callable[[], T]) -> T:
    """Call a function that uses a model, with the weights at hand that its forward would have. May be nested.

    Args:
        model: sharded or not.
        function: returns tensors, or tuples of them; gradients have to go through what it returns.
    """
    if not isinstance(model, FSDPModule) or getattr(model, _COMPUTING):
        return function()
    setattr(model, _COMPUTING, True)
    try:
        result: T = getattr(model, _COMPUTE)(function)
    finally:
        setattr(model, _COMPUTING, False)
    if not torch.is_grad_enabled():
        model.reshard()  # no backward pass will, and weights are changed in their shards only
    return result


@contextmanager
def gathered(model: nn.Module, all_layers: bool = True) -> Iterator[None]:
    """Within it, every weight of a sharded model is at hand, for work such as sampling that reads them many times.

    To be entered inside :func:`as_forward`.

    Args:
        model: sharded or not.
        all_layers: False changes nothing: each layer is gathered when it is called.
    """
    layers = _sharded_parts(model, itself=False) if all_layers else []
    for layer in layers:
        layer.unshard()
        layer.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True, recurse=False)
            layer.reshard()


def copy_model(model: nn.Module) -> nn.Module:
    """A copy of a whole model.

    Raises:
        UserError: if its weights are spread over ranks.
    """
    if isinstance(model, FSDPModule):
        raise UserError("roles cannot be copied after FSDP has spread them; build a new module to train after a test.")
    return copy.deepcopy(model)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model on the CPU, gathered where they are sharded; empty on all ranks but the first.

    A weight at a time is whole on the device; one with two names, as a tied output layer, is returned by the first.
    Every rank has to call it.
    """
    whole: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, weight in model.state_dict(keep_vars=True).items():
        if id(weight) in seen:
            continue
        seen.add(id(weight))
        weight = weight.detach()
        weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
        if rank() == 0:
            whole[name] = weight.cpu()
    return whole


def _call(model: nn.Module, function: Callable[[], T]) -> T:
    return function()


def _sharded_parts(module: nn.Module, itself: bool = True) -> list[FSDPModule]:
    parts = module.modules() if itself else (part for part in module.modules() if part is not module)
    return [part for part in parts if isinstance(part, FSDPModule)]
