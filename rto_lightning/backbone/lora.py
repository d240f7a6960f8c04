"""The forward of a LoRA layer, without what one active adapter does not need.

    y = W x + (alpha / r) * B A x

PEFT's own forward serves any number of adapters, merging, dropout and variants; for that it casts, copies and scales
activations as wide as y. Here the low-rank product is added to W x in place, by one matrix product, and nothing
but x and A x is kept for the backward pass. It computes in the data type of x: float32 adapters on a bfloat16 base are
rounded to bfloat16 for the product, as autocast would do, and stay float32 masters.

Read and replaced on each layer are `_active_adapter`, `_disable_adapters` and `forward` of PEFT 0.21.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn


def simplify_forward(layer: Any) -> None:
    """Give a PEFT layer the forward of this file, if it is a plain linear one, quantized to 4 bits or not.

    Other kinds keep PEFT's: variants such as DoRA, adapters with a bias, embeddings, convolutions, 8-bit layers. Call
    it again after each adapter that is added to the layer.
    """
    if _is_plain_linear(layer):
        layer.forward = LoraForward(layer)
    else:
        vars(layer).pop("forward", None)


class LoraForward:
    """The forward of one layer, called with its input (..., K) and returning (..., N).

    Args:
        layer: a LoRA layer of PEFT, whose active adapter is read at each call.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        # The result of a quantized product is a view, which autograd does not let be changed in place.
        self.in_place = type(layer.get_base_layer()) is nn.Linear

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y = W x + scaling * B A x with the active adapter, or W x without one."""
        layer = self.layer
        if layer.merged_adapters or args or kwargs:
            plain: Tensor = type(layer).forward(layer, x, *args, **kwargs)
            return plain
        base = layer.base_layer
        active = layer._active_adapter
        adapter = active if isinstance(active, str) else active[0]
        if layer._disable_adapters or adapter not in layer.lora_A:
            result: Tensor = base(x)
            return result
        rows = x.reshape(-1, x.shape[-1])
        projected = nn.functional.linear(rows, layer.lora_A[adapter].weight.to(x.dtype))
        output: Tensor = base(rows)
        up = layer.lora_B[adapter].weight.to(output.dtype).t()
        projected, scaling = projected.to(output.dtype), layer.scaling[adapter]
        if self.in_place:
            output.addmm_(projected, up, alpha=scaling)
        else:
            # Autocast would round the sum to 16 bits, where the base alone gives 32.
            with torch.autocast(x.device.type, enabled=False):
                output = torch.addmm(output, projected, up, alpha=scaling)
        return output.view(*x.shape[:-1], output.shape[-1])


def _is_plain_linear(layer: Any) -> bool:
    base = getattr(layer, "base_layer", None)
    is_linear = type(layer) is PeftLinear and type(base) is nn.Linear and not layer.fan_in_fan_out
    if not (is_linear or (type(layer).__name__ == "Linear4bit" and type(base).__name__ == "Linear4bit")):
        return False
    no_dropout = all(isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values())
    return no_dropout and not layer.lora_variant and not any(layer.lora_bias.values())
