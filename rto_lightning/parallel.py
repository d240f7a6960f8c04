"""What several processes, one a device, agree on: tables of rows, sums, gradients. With one process nothing happens.

Rows of a global batch are dealt in contiguous, equal shares, so that tables gathered in the order of ranks stand in the
order that a single process has.
"""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

T = TypeVar("T")

BUCKET_ELEMENTS = 2**23
"""Elements of gradients that one all-reduce carries (32 MiB in float32)."""


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if _initialized() else 0


def ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _initialized() else 1


def largest(*numbers: int) -> tuple[int, ...]:
    """Of each number the largest that a rank has."""
    if ranks() == 1:
        return numbers
    agreed = torch.tensor(numbers, device=_device())
    dist.all_reduce(agreed, dist.ReduceOp.MAX)
    return tuple(agreed.tolist())


def gather_rows(table: Tensor) -> Tensor:
    """The tables of all ranks below each other.

    Args:
        table: (B, ...), of the same shape and type on every rank.

    Returns:
        (W * B, ...) with W ranks, in their order.
    """
    if ranks() == 1:
        return table
    sent = table.to(torch.uint8) if table.dtype == torch.bool else table  # not every backend carries bool
    tables = [torch.empty_like(sent, memory_format=torch.contiguous_format) for _ in range(ranks())]
    dist.all_gather(tables, sent.contiguous())
    return torch.cat(tables).to(table.dtype)


def gather_objects(thing: T) -> list[T]:
    """What each rank has, in their order; of any type that pickles. No rank goes on before all are here."""
    if ranks() == 1:
        return [thing]
    things: list[Any] = [None] * ranks()
    dist.all_gather_object(things, thing)
    return things


def sum_over_ranks(number: Tensor) -> Tensor:
    """The sum over ranks of a detached tensor, which is left as it is."""
    return _reduced(number, dist.ReduceOp.SUM)


def largest_over_ranks(number: Tensor) -> Tensor:
    """The largest of a detached tensor over ranks, element by element; the tensor is left as it is."""
    return _reduced(number, dist.ReduceOp.MAX)


def sum_gradients(parameters: Iterable[nn.Parameter], mean: bool = False) -> None:
    """Add up the gradients of replicated weights over ranks, in place.

    Sharded weights are left alone: FSDP has reduced their gradients in the backward pass. Every rank must hold
    gradients for the same weights.

    Args:
        parameters: the weights; those without a gradient are left out.
        mean: divide the sum by the number of ranks.
    """
    if ranks() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket]) if len(bucket) > 1 else bucket[0].flatten()
        dist.all_reduce(flat)
        if mean:
            flat /= ranks()
        for gradient, part in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of the whole gradient, the same scalar on all ranks."""
    norms = [get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in _kinds(parameters)]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    if len(whole) == 1:
        return whole[0]
    return torch.linalg.vector_norm(torch.stack(whole)) if whole else torch.zeros(())


def clip_gradients(parameters: Iterable[nn.Parameter], largest_norm: float | None) -> Tensor:
    """As `torch.nn.utils.clip_grad_norm_`, with the norm of the whole gradient where weights are sharded.

    A norm that is not finite leaves the gradients as they are, so that one can tell which of them are not.

    Args:
        parameters: replicated or sharded.
        largest_norm: None only measures.

    Returns:
        The norm before clipping, a scalar.
    """
    parameters = list(parameters)
    norm = gradient_norm(parameters)
    if largest_norm is not None:
        for kind in _kinds(parameters):
            clip_grads_with_norm_(kind, largest_norm, norm.nan_to_num(0.0, 0.0, 0.0))
    return norm


def _kinds(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Those that have gradients, sharded and replicated ones apart, which torch does not take together."""
    with_gradient = [p for p in parameters if p.grad is not None]
    kinds = ([p for p in with_gradient if isinstance(p.grad, DTensor) is sharded] for sharded in (True, False))
    return [kind for kind in kinds if kind]


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def _device() -> torch.device:
    """Where the default process group takes its tensors."""
    backend = dist.get_backend()
    return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")


def _reduced(number: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if ranks() == 1:
        return number
    result = number.detach().clone()
    dist.all_reduce(result, operation)
    return result


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one type and device each, up to `BUCKET_ELEMENTS` or a single larger one."""
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        differs = bucket and (gradient.dtype, gradient.device) != (bucket[0].dtype, bucket[0].device)
        if bucket and (differs or size + gradient.numel() > BUCKET_ELEMENTS):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.numel()
    if bucket:
        yield bucket
