"""The sizes that are run: models, prompts and responses."""

from dataclasses import dataclass, field
from typing import Any

from rto_lightning.backbone import LoraSettings

LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}
"""The shape of Llama 3 8B."""
SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 8}
"""Changes to the tiny model of `tests.models`; 3.3 million weights."""


@dataclass(frozen=True)
class NumericsShape:
    """Models whose results on two devices are compared."""

    models: dict[str, dict[str, Any]] = field(default_factory=lambda: {"tiny": {}, "small": SMALL})
    """For each model, what differs from the tiny one of `tests.models`."""
    prompts: int = 8
    """Samples that are read."""
    prompt_tokens: int = 24
    """Longest prompt."""
    response_tokens: int = 40
    """Longest response, and how many tokens are sampled."""


@dataclass(frozen=True)
class IterationShape:
    """One RTO iteration whose memory and speed are measured."""

    model: dict[str, Any] = field(default_factory=lambda: dict(LLAMA_8B))
    """What differs from the tiny model of `tests.models`."""
    lora: LoraSettings = field(default_factory=lambda: LoraSettings(rank=16, alpha=32))
    """Adapter of each role."""
    prompts: int = 16
    """Prompts of an iteration, with one response each."""
    prompt_tokens: int = 1024
    """Tokens of every prompt."""
    response_tokens: int = 1024
    """Tokens of every response."""
    microbatch: int = 2
    """Samples for each forward and backward; scoring takes twice as many."""
    iterations: int = 2
    """Iterations; the first one also starts kernels and fills the allocator."""


TINY_NUMERICS = NumericsShape({"tiny": {}}, prompts=3, prompt_tokens=6, response_tokens=5)
"""Runs in a second."""
TINY_ITERATION = IterationShape({"vocab_size": 300}, LoraSettings(rank=4, alpha=8), 4, 12, 6, 2, 2)
"""Runs in two seconds."""
