"""Weights of a role as files that vLLM reads, and when they have to be written again."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

SHARED_MEMORY = Path("/dev/shm")


def transfer_folder(parent: str | None) -> Path:
    """A new folder for weights on their way, in memory if the machine has a file system there.

    Args:
        parent: where to; None chooses.
    """
    if parent is not None:
        Path(parent).mkdir(parents=True, exist_ok=True)
    elif SHARED_MEMORY.is_dir():
        parent = str(SHARED_MEMORY)
    return Path(tempfile.mkdtemp(prefix="rto-lightning-", dir=parent))


@torch.no_grad()
def weights_digest(weights: Iterable[Tensor]) -> tuple[float, ...]:
    """Sum and norm of each tensor, of this rank's part where it is sharded: a training step changes them.

    Args:
        weights: floating-point tensors.
    """
    figures = []
    for weight in weights:
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        figures += [local.sum(dtype=torch.float64), torch.linalg.vector_norm(local, dtype=torch.float64)]
    return tuple(torch.stack(figures).tolist()) if figures else ()


@torch.no_grad()
def write_model(model: PreTrainedModel, folder: Path, dtype: torch.dtype, write: bool = True) -> None:
    """Write a Hugging Face model without its adapters.

    Every rank has to call it, since sharded weights are gathered, one at a time; those who write hold them all on the
    host for that time.

    Args:
        model: sharded or not. Weights that are tied are written once.
        folder: exists and is empty.
        dtype: of the written weights.
        write: False takes part in the gathering only.
    """
    weights: dict[str, Tensor] = {}
    tied: set[int] = set()
    for name, weight in model.state_dict(keep_vars=True).items():
        if ".lora_" in name or id(weight) in tied:
            continue
        tied.add(id(weight))
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        if write:
            weights[name.replace(".base_layer.", ".")] = whole.to(device="cpu", dtype=dtype)
    if write:
        model.save_pretrained(folder, state_dict=weights)
