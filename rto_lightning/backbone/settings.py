"""What to load and how: the settings of the base model and of the adapters on it."""

from dataclasses import dataclass, field
from typing import Literal

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters (LoRA, arXiv 2106.09685), one for each trained role."""

    rank: int = 16
    """Rank of the two factors."""
    alpha: int = 32
    """Scale of the update; it is multiplied by `alpha / rank`."""
    target_modules: str | list[str] = "all-linear"
    """Names of the layers that get an adapter; `all-linear` is every linear layer but the output layer."""
    rank_stabilized: bool = False
    """Scale by `alpha / sqrt(rank)` instead (rsLoRA, arXiv 2312.03732)."""


@dataclass(frozen=True)
class BackboneSettings:
    """The base model that every role shares."""

    model: str
    """Hub name or local folder of a causal language model."""
    revision: str | None = None
    """Branch, tag or commit of the hub model."""
    mode: Literal["adapters", "full"] = "adapters"
    """`adapters` trains LoRA adapters on one frozen base; `full` trains a copy of all weights for each trained role."""
    init: str | None = None
    """Saved SFT role from which policy and reference start; without it they start as the base model."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Data type of frozen weights. Trained weights are always float32 (float64 if this is float64)."""
    quantization: Literal["nf4"] | None = None
    """`nf4` holds the frozen base in 4 bits (QLoRA, arXiv 2305.14314, double quantization); needs mode `adapters`."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """Shape of the adapters that are trained in mode `adapters`."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers."""
    gradient_checkpointing: bool = False
    """Recompute the activations of each layer in the backward pass: less memory, about a third more time."""
    logprob_chunk_tokens: int = 1024
    """Response tokens whose logits exist at a time; bounds memory to this many times the vocabulary size."""
    chat_template: str | None = None
    """Jinja text or file that replaces the tokenizer's chat template; `plain` takes the messages' text as it is."""
    trust_remote_code: bool = False
    """Let the model folder run its own Python code. Leave off unless you have read that code."""

    @property
    def frozen_dtype(self) -> torch.dtype:
        """Data type of weights that are not trained."""
        return DTYPES[self.dtype]

    @property
    def trained_dtype(self) -> torch.dtype:
        """Data type of the master copy of trained weights; bfloat16 would swallow small updates."""
        return torch.float64 if self.dtype == "float64" else torch.float32
