"""Which tensors of a stage have to be finite, in the order in which they are computed, and whether they are."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rto_lightning.modules.experience import Experience
from rto_lightning.parallel import rank, ranks

Named = Iterable[tuple[str, Tensor]]
"""Tensors in the order in which they are computed, each with what a sentence calls it."""


@dataclass(frozen=True)
class NonFinite:
    """A tensor that holds NaN or infinity."""

    place: int
    """In the order in which tensors are computed."""
    name: str
    """What a sentence calls it."""
    bad: int
    """Elements that are NaN or infinite."""
    size: int
    """All its elements."""


def first_nonfinite(tensors: Named) -> NonFinite | None:
    """The first tensor that is not finite, or None; of a tensor spread over ranks this rank's part is read."""
    for place, (name, tensor) in enumerate(tensors):
        part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        bad = part.numel() - int(part.isfinite().sum())
        if bad:
            return NonFinite(place, name, bad, part.numel())
    return None


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether no element is NaN or infinite: a bool scalar, on the device of the first tensor."""
    finite = [tensor.isfinite().all() for tensor in tensors]
    return torch.stack([of_tensor.to(finite[0].device) for of_tensor in finite]).all()  # FSDP may offload gradients


def experience_tensors(experience: Experience, sources: Sequence[str], own: bool = False) -> list[tuple[str, Tensor]]:
    """What the update of an RTO iteration rests on. The entropy is only logged, or shows in the loss.

    Args:
        experience: of all ranks.
        sources: names of the reward sources.
        own: of the samples of this rank only.
    """
    share = len(experience.mask) // ranks()
    rows = slice(rank() * share, (rank() + 1) * share) if own else slice(None)
    scores = () if experience.scores is None else experience.scores.T
    tensors: list[tuple[str, Tensor | None]] = [
        ("the policy's log-probabilities", experience.logprobs),
        ("log(policy / reference)", experience.kl),
        *((f"the scores of {source}", column) for source, column in zip(sources, scores, strict=True)),
        ("the token rewards, log(dpo / reference)", experience.terms.token),
        ("the KL rewards", experience.terms.kl),
        ("the score rewards", experience.terms.score),
        ("the critic's values", experience.values),
        ("the advantages", experience.advantages),
        ("the returns", experience.returns),
    ]
    return [(name, tensor[rows]) for name, tensor in tensors if tensor is not None]


def losses(metrics: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """The losses among the metrics of a minibatch."""
    names = {"policy/loss": "the policy loss", "critic/loss": "the value loss"}
    return [(name, metrics[key]) for key, name in names.items() if key in metrics]


def gradients(module: nn.Module, weights: Iterable[nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
    """The gradients of some weights of a module, which names them."""
    chosen = {id(weight) for weight in weights}
    for name, weight in module.named_parameters():
        if id(weight) in chosen and weight.grad is not None:
            yield f"the gradient of {name}", weight.grad
