"""Settings of a rollout: how responses are sampled, and by which engine."""

import importlib.util
from dataclasses import dataclass, field
from typing import Any, Literal

from rto_lightning.errors import UserError, check_settings


@dataclass(frozen=True)
class VLLMSettings:
    """Where vLLM runs and what it may take; read only with `rollout.engine: vllm`.

    vLLM holds its own copy of the base model, in addition to the one that is trained. `rollout.batch_size` bounds the
    responses that it samples at a time.
    """

    mode: Literal["colocated", "server"] = "colocated"
    """`colocated` starts one engine for each training process, on the device of that process; `server` asks a server
    over HTTP: one that each node starts for itself, or those that `urls` names."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Data type in which vLLM holds and multiplies weights; null takes `backbone.dtype` (float32 for float64)."""
    gpu_memory_utilization: float | None = None
    """Share of the device's memory for weights and key-value cache of vLLM; null takes 0.3 colocated, else 0.9."""
    max_model_len: int | None = None
    """Longest prompt and response together, in tokens; null takes the context of the model, or what fits memory."""
    tensor_parallel_size: int = 1
    """Devices over which a server splits each layer."""
    enforce_eager: bool = False
    """Skip compilation and CUDA graphs: a faster start, slower sampling."""
    engine_options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's engine by their Python names, such as `{quantization: bitsandbytes}`."""
    urls: list[str] = field(default_factory=list)
    """Servers that run already, such as `http://node7:8000`; training process r asks number r modulo their count."""
    port: int | None = None
    """On which a server that is started here listens, on the loopback address; null finds a free one."""
    devices: str | None = None
    """`CUDA_VISIBLE_DEVICES` of a server that is started here, such as `4,5,6,7`; null takes those of training."""
    transfer_folder: str | None = None
    """Folder through which weights reach vLLM; null takes `/dev/shm`, or where there is none the folder for temporary
    files. A server on another machine needs one that both see."""
    start_timeout: float = 900.0
    """Seconds within which a server must be ready."""
    rollout_timeout: float = 3600.0
    """Seconds within which a server must answer; then it counts as crashed."""

    def __post_init__(self) -> None:
        """Raise UserError for values that no run can use."""
        where = "model.rollout.vllm"
        positive = ("max_model_len", "tensor_parallel_size", "port", "start_timeout", "rollout_timeout")
        check_settings(where, self, (*positive, "gpu_memory_utilization"))
        if self.gpu_memory_utilization is not None and self.gpu_memory_utilization > 1:
            raise UserError(f"{where}.gpu_memory_utilization is {self.gpu_memory_utilization}; set it to 1 or less.")
        if self.mode == "colocated":
            for name in ("urls", "port", "devices"):
                if getattr(self, name):
                    raise UserError(f"{where}.{name} is for mode server, and mode is colocated; set mode to server.")
            if self.tensor_parallel_size > 1:
                raise UserError(
                    f"{where}.tensor_parallel_size {self.tensor_parallel_size} needs several devices, and a colocated "
                    "engine has that of its training process; set mode to server."
                )
        if self.urls and (self.port or self.devices):
            raise UserError(f"{where}.urls name servers that run already; set port and devices to null.")


@dataclass(frozen=True)
class RolloutSettings:
    """How responses are sampled. PPO needs samples of the policy itself, so there is no top-p and no top-k."""

    max_new_tokens: int = 256
    """Length limit of a response in tokens, the stop id included."""
    temperature: float = 1.0
    """Divides the policy's logits, and those of the KL reference. 0 is greedy, for `predict` only."""
    responses_per_prompt: int = 1
    """Responses to each prompt in training; held-out prompts get one."""
    batch_size: int | None = None
    """Responses that are sampled at a time, which bounds the key-value cache; null takes all of the iteration at once.
    It changes neither what is drawn nor the order of the responses."""
    gather_weights: bool = True
    """Where FSDP spreads the model: gather it once a rollout, after which ranks sample on their own. False gathers each
    layer at every token, for a model that fits no single device. Only with engine transformers."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What samples: the model that is trained, or vLLM, to which weights are handed over when they have changed. The
    same seeds give other draws in vLLM, and `ppo.sampling_logprobs` is then off."""
    vllm: VLLMSettings = field(default_factory=VLLMSettings)
    """Where vLLM runs and what it may take."""

    def __post_init__(self) -> None:
        """Raise UserError for values that no run can use."""
        positive = ("max_new_tokens", "responses_per_prompt", "batch_size")
        check_settings("model.rollout", self, positive, not_negative=("temperature",))

    def check(
        self, min_response_tokens: int, sampling_logprobs: bool | None, importance_weight_cap: float | None
    ) -> None:
        """Compare them with `rewards.min_response_tokens` and two settings of `ppo`.

        Raises:
            UserError: if no response can be long enough, or log-probabilities are to be taken, or corrected, from an
                engine that does not give them.
        """
        if min_response_tokens > self.max_new_tokens:
            raise UserError(
                f"rewards.min_response_tokens {min_response_tokens} is above rollout.max_new_tokens "
                f"{self.max_new_tokens}, so that every response would pay; set it lower."
            )
        if self.engine == "vllm" and sampling_logprobs:
            raise UserError(
                "ppo.sampling_logprobs does not go with rollout.engine vllm because policy and ratio need the "
                "log-probabilities of the model that is trained; set it to null."
            )
        if self.engine != "vllm" and importance_weight_cap is not None:
            raise UserError(
                "ppo.importance_weight_cap corrects what rollout.engine vllm samples, and the engine is "
                f"{self.engine}; set it to null."
            )

    def check_engine(self, training: bool) -> None:
        """Raise UserError if the engine is not installed, or training would sample at temperature 0."""
        if training and self.temperature <= 0:
            raise UserError("rollout.temperature is 0, which gives PPO nothing to learn from; set it above 0.")
        if self.engine == "vllm" and not self.vllm.urls and importlib.util.find_spec("vllm") is None:
            raise UserError(
                "rollout.engine vllm needs the package vllm; run `pip install 'rto-lightning[vllm]'`, or set "
                "rollout.engine to transformers."
            )
