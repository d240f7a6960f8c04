"""How an engine of vLLM is talked to, whether it runs in a process of ours or behind a server."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rto_lightning.backbone import PolicyBackbone
from rto_lightning.rollout.settings import RolloutSettings

COLOCATED_MEMORY = 0.3
SERVER_MEMORY = 0.9
"""Shares of a device's memory that vLLM takes if the settings name none."""
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Largest ranks of adapters between which vLLM lets one choose."""


class EngineStopped(Exception):
    """The engine does not run any more, or does not answer; the message is what it said last."""


class Sample(NamedTuple):
    """One response."""

    tokens: list[int]
    """Its ids, with the stop id if one was sampled."""
    logprobs: list[float]
    """Of each token, nats, at the sampling temperature."""


class Client(Protocol):
    """One engine. Every method but `close` raises :class:`EngineStopped` if the engine is gone."""

    max_model_len: int
    """Tokens that a prompt and its response may have together; known once it has started."""

    @property
    def place(self) -> str:
        """What ranks that share an engine have in common, and no others."""
        ...

    def start(self) -> str:
        """Start the engine, or wait until it can be reached; returns its address.

        Raises:
            UserError: if vLLM refuses the model or the settings.
        """
        ...

    def connect(self, address: str) -> None:
        """Use an engine that another rank has started."""
        ...

    def add_adapter(self, name: str, folder: Path) -> None:
        """Make a PEFT folder, which stays where it is, known under a name that no adapter had before."""
        ...

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter."""
        ...

    def load_weights(self, folder: Path) -> None:
        """Replace the weights of the base by those of a Hugging Face folder, and forget what was computed with them."""
        ...

    def sample(self, prompts: Sequence[list[int]], seeds: Sequence[int], adapter: str | None) -> list[Sample]:
        """A response to each prompt, with an adapter or as the base."""
        ...

    def close(self) -> None:
        """End an engine that this client has started."""
        ...


def engine_arguments(backbone: PolicyBackbone, settings: RolloutSettings) -> dict[str, Any]:
    """Arguments of vLLM's engine, by their Python names; those that are None are left to vLLM.

    Args:
        backbone: names the model; the ranks of its adapters bound those of the engine.
        settings: of the rollout.
    """
    model, vllm = backbone.settings, settings.vllm
    memory = vllm.gpu_memory_utilization
    if memory is None:
        memory = COLOCATED_MEMORY if vllm.mode == "colocated" else SERVER_MEMORY
    arguments: dict[str, Any] = {
        "dtype": vllm.dtype or ("float32" if model.dtype == "float64" else model.dtype),
        "revision": model.revision,
        "trust_remote_code": model.trust_remote_code,
        "tensor_parallel_size": vllm.tensor_parallel_size,
        "gpu_memory_utilization": memory,
        "max_model_len": vllm.max_model_len or -1,  # vLLM's name for: what fits memory
        "max_num_seqs": settings.batch_size,
        "enforce_eager": vllm.enforce_eager,
        # A model's own sampling defaults (top-k, repetition penalty) would make it another distribution.
        "generation_config": "vllm",
        # At the sampling temperature, as the trainer reads them.
        "logprobs_mode": "processed_logprobs",
    }
    if model.mode == "adapters":
        rank = backbone.adapters.largest_rank()
        largest = next((size for size in LORA_RANKS if size >= rank), rank)
        arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": largest}
    return {name: value for name, value in (arguments | vllm.engine_options).items() if value is not None}


def sampling_arguments(stop_ids: Sequence[int], settings: RolloutSettings) -> dict[str, Any]:
    """Arguments of vLLM's sampling that every prompt shares.

    The stop ids of the chat are the only ones: they may lack the tokenizer's EOS, which vLLM would add.
    """
    return {
        "temperature": settings.temperature,
        "max_tokens": settings.max_new_tokens,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": list(stop_ids),
        "ignore_eos": True,
        "logprobs": 0,  # of the sampled token only
    }
