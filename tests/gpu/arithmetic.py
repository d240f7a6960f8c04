"""How much a phase has to compute, and how much the card could have computed meanwhile.

Counted are the matrix products of the base model and of attention, as in PaLM's model FLOPs utilization (arXiv
2204.02311), with causal attention counted as what it needs, half a square. Adapters (under 1%), softmaxes and the
unpacking of 4-bit weights are not counted, and neither is what gradient checkpointing computes again.
"""

import re
from dataclasses import dataclass

from transformers import LlamaConfig

PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "4090": 165.0, "L4": 121.0}
"""Dense bfloat16 matrix products with float32 sums, by the makers' data sheets; of the H100 the SXM module."""


def peak_tflops(card: str) -> float | None:
    """The bfloat16 peak of a card by the name that the driver gives it; None for an unknown one."""
    words = re.split(r"[^A-Za-z0-9]+", card)
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in words), None)


def causal_pairs(length: int) -> int:
    """Pairs of a query and a key at or before it, in a sequence."""
    return length * (length + 1) // 2


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a model on B samples of P prompt and T response tokens."""

    body_weights: int
    """Weights of the linear layers, without the output layer."""
    output_weights: int
    """Weights of the output layer."""
    attention_width: int
    """Layers times attention heads times head dimension."""

    @classmethod
    def of(cls, config: LlamaConfig) -> "Work":
        """Of a Llama of this shape."""
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
        layer = config.hidden_size * (2 * queries + 2 * keys + 3 * config.intermediate_size)
        layers = config.num_hidden_layers
        return cls(layers * layer, config.vocab_size * config.hidden_size, layers * queries)

    def forward(self, tokens: int, pairs: int, outputs: int) -> int:
        """Of a forward; a multiplication and an addition are two.

        Args:
            tokens: positions that go through the layers.
            pairs: pairs of a query and a key that it sees.
            outputs: positions that go through the output layer.
        """
        return 2 * (tokens * self.body_weights + 2 * pairs * self.attention_width + outputs * self.output_weights)

    def rollout(self, samples: int, prompt: int, response: int) -> int:
        """Of sampling with a key-value cache; the last token sampled is not read."""
        length = prompt + response - 1
        return samples * self.forward(length, causal_pairs(length), response)

    def scoring(self, samples: int, prompt: int, response: int) -> int:
        """Of reading the samples as policy, reference and dpo, and without output layer as reward and critic."""
        length = prompt + response
        return samples * self.forward(5 * length, 5 * causal_pairs(length), 3 * response)

    def update(self, samples: int, prompt: int, response: int) -> int:
        """Of one epoch of policy and, without output layer, critic.

        The backward of a frozen layer has one product where its forward has one, the gradient of its input. Attention
        has four where its forward has two.
        """
        length = prompt + response
        return samples * self.forward(4 * length, 6 * causal_pairs(length), 2 * response)
