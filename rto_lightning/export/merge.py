"""A whole model of an adapter: W + scaling * B A, computed in float32 and rounded once."""

from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from rto_lightning.backbone import BackboneSettings
from rto_lightning.backbone.loading import load_pretrained


def load_plain(settings: BackboneSettings, dtype: torch.dtype | str) -> PreTrainedModel:
    """The model of the settings as transformers alone loads it, in evaluation.

    Args:
        settings: name it.
        dtype: of its weights; `auto` is that of its files.
    """
    trust = settings.trust_remote_code
    model = load_pretrained(AutoModelForCausalLM, settings.model, settings.revision, trust, dtype=dtype)
    model.eval()
    return model


def merge_adapter(base: PreTrainedModel, adapter: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Add an adapter to the weights of a base model, one layer at a time.

    Args:
        base: freshly loaded, never in 4 bits; it is changed.
        adapter: a PEFT folder.
        dtype: in which the result is held.

    Returns:
        The model without adapters.
    """
    wrapped = PeftModel.from_pretrained(base, str(adapter))
    for layer in wrapped.modules():
        if isinstance(layer, BaseTunerLayer):
            # In 16 bits PEFT would round the update before the sum, and the sum again.
            layer.get_base_layer().to(torch.float32)
            layer.merge(safe_merge=True)
            layer.get_base_layer().to(dtype)
    merged: nn.Module = wrapped.unload()
    return merged.to(dtype).eval()  # type: ignore[return-value]


@torch.no_grad()
def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Give every weight the nearest value that `dtype` has, and leave it in its own data type, in place."""
    for weight in model.parameters():
        weight.copy_(weight.to(dtype))
