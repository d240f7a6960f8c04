"""float32 linear layers on AMD processors, computed by oneDNN.

PyTorch multiplies float32 matrices on x86 by MKL, which does not use AVX-512 on AMD processors. oneDNN, which is part
of PyTorch too and computes its bfloat16 products, does: frozen layers run at about twice the rate, forward and
backward. The results differ from MKL's by float32 rounding.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SMALLEST_WEIGHT = 2**16
"""Elements below which a layer is left alone: there the call itself costs more than the product."""


@cache
def onednn_is_faster() -> bool:
    """Whether this machine is one where it pays: an AMD processor with AVX-512, and a PyTorch with MKL and oneDNN.

    Told from the machine and never timed, so that a run computes the same numbers when it is repeated.
    """
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    cpuinfo = Path("/proc/cpuinfo")
    is_amd = cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text(encoding="utf-8", errors="replace")
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return is_amd and has_avx512 and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def use_onednn(model: nn.Module) -> int:
    """Give the large float32 linear layers of a model the forward of this file; returns how many there are.

    A layer falls back to PyTorch's own at each call that it does not fit: trained weights, other types, other devices,
    sharded weights, autocast.
    """
    layers = [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and module.weight.dtype == torch.float32
        and module.weight.numel() >= SMALLEST_WEIGHT
    ]
    for layer in layers:
        layer.forward = OneDnnForward(layer)  # type: ignore[method-assign, assignment]
    return len(layers)


class OneDnnForward:
    """The forward of one layer, from (..., K) to (..., N).

    Args:
        layer: its weight and bias are read at each call.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        """y = W x + b."""
        weight, bias = self.layer.weight, self.layer.bias
        if not _fits(x, weight, bias):
            return nn.functional.linear(x, weight, bias)
        y: Tensor = _FrozenLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]  # torch leaves it without
        return y


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        return False
    plain = type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.is_contiguous()
    float32 = x.dtype == weight.dtype == torch.float32
    return plain and float32 and x.numel() > 0 and not torch.is_autocast_enabled("cpu")


class _FrozenLinear(torch.autograd.Function):
    """A linear layer whose weights get no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _product(grad, weight.t(), None), None, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # What torch.compile calls for a linear layer; PyTorch offers it under no public name.
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
    return result
