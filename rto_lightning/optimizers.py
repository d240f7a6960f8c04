"""Optimizers as configurations name them, and whether one works on the device of a run.

    optimizer: {class_path: AdamW, init_args: {lr: 2.0e-4, fused: true}}   torch.optim.AdamW; fused: few kernels a step
    optimizer: {class_path: AdamW8bit, init_args: {lr: 2.0e-4}}            bitsandbytes: 2 bytes of state a weight
    optimizer: {class_path: PagedAdamW8bit, init_args: {lr: 2.0e-4}}       the same, in memory that can leave the GPU

bitsandbytes keeps both moments in 8 bits, with a float32 scale for every 256 values. Weights of fewer than
`min_8bit_size` (4096) elements keep 32-bit moments: heads, and the LoRA factors of narrow layers (rank x width).
Moments of 100,000 elements and more are paged: the driver moves them to the CPU's memory when the GPU's is full; those
read from a checkpoint stay on the GPU. On a CPU there is nothing to page to: PagedAdamW8bit is AdamW8bit there, as a
warning says.
"""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from rto_lightning.errors import UserError, first_line

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]

_UNSCALES = "_step_supports_amp_scaling"
"""What torch sets on an optimizer whose step undoes the loss scaling of fp16."""
_PROBE_SHAPE = (320, 320)
"""Of the weight on which an optimizer is tried: a matrix, as Muon asks for, that is large enough to be paged."""


def build_optimizer(make: MakeOptimizer, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The optimizer of some weights, so marked that Lightning clips their gradients.

    A fused optimizer of torch says that it can undo the loss scaling of fp16 itself, and Lightning then refuses
    `gradient_clip_val` under bf16-mixed too, where nothing is scaled. The stages refuse fp16, so the mark is taken off.

    Args:
        make: what a configuration names.
        parameters: the weights.
    """
    optimizer = make(parameters)
    if getattr(optimizer, _UNSCALES, False):
        setattr(optimizer, _UNSCALES, False)
    return optimizer


def check_optimizer(make: MakeOptimizer, key: str, device: torch.device, dtype: torch.dtype) -> None:
    """Build an optimizer for one weight and take one step of it, before a model is loaded.

    Args:
        make: what a configuration names.
        key: its key there.
        device: where the trained weights will be.
        dtype: of the trained weights.

    Raises:
        UserError: if it cannot be built, or cannot step on that device and data type.
    """
    name = "the optimizer"
    try:
        weight = nn.Parameter(torch.zeros(_PROBE_SHAPE, dtype=dtype, device=device))
        optimizer = build_optimizer(make, [weight])
        name = type(optimizer).__name__
        weight.grad = torch.zeros_like(weight)
        optimizer.step(lambda: 0.0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # a kernel that the card does not have fails here, not later
    except Exception as error:  # whatever it is, it would end the run after the model has been loaded
        raise UserError(
            f"{key}: {name} does not work on {device.type} with {str(dtype).removeprefix('torch.')} weights "
            f"({first_line(error)}); change its init_args, or take torch.optim.AdamW."
        ) from error


def check_shardable(make: MakeOptimizer, key: str) -> None:
    """Raise UserError for an optimizer that does not step weights of which every rank holds a part."""
    optimizer = make([nn.Parameter(torch.zeros(_PROBE_SHAPE))])
    if type(optimizer).__module__.startswith("bitsandbytes"):
        raise UserError(
            f"{key}: {type(optimizer).__name__} does not step weights that FSDP spreads over devices; take "
            "torch.optim.AdamW, or model.backbone.mode adapters."
        )
