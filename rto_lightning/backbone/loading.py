"""Load a base model and its tokenizer from a hub name or a local folder."""

import importlib
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
)

from rto_lightning.backbone.chat import ChatTokenizer
from rto_lightning.backbone.model_files import check_folder, check_source, weight_files
from rto_lightning.backbone.roles import looks_like_hub_name
from rto_lightning.backbone.settings import BackboneSettings
from rto_lightning.errors import UserError, first_line

BITSANDBYTES = "0.49"
"""The oldest bitsandbytes whose 4-bit weights train on a CPU too; `pyproject.toml` asks for it."""


def load_chat_tokenizer(settings: BackboneSettings) -> ChatTokenizer:
    """Load the tokenizer of the base model with its chat template and stop ids.

    Raises:
        UserError: if there is no such model, or it has no chat template and none is set.
    """
    return load_chat_tokenizer_from(
        settings.model, settings.revision, settings.chat_template, settings.trust_remote_code
    )


def load_chat_tokenizer_from(
    model: str, revision: str | None = None, chat_template: str | None = None, trust_remote_code: bool = False
) -> ChatTokenizer:
    """As :func:`load_chat_tokenizer`, for any model folder or hub name."""
    tokenizer = load_tokenizer(model, revision, trust_remote_code)
    try:
        generation = GenerationConfig.from_pretrained(model, revision=revision or "main")
        stop_ids = [int(index) for index in _as_list(generation.eos_token_id)]
    except OSError:  # a model without generation_config.json stops at the tokenizer's EOS
        stop_ids = []
    except Exception as error:
        raise _not_loadable("generation_config.json", model, error) from error
    return ChatTokenizer(tokenizer, stop_ids, chat_template, model)


def load_tokenizer(source: str, revision: str | None, trust_remote_code: bool) -> Any:
    """A tokenizer of transformers; see :func:`load_pretrained` for arguments and errors."""
    if Path(source).is_dir():
        check_folder(Path(source))
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers documents none, and files of others can hold anything
        raise _not_loadable("tokenizer", source, error) from error


def load_pretrained(
    kind: Any, source: str, revision: str | None = None, trust_remote_code: bool = False, **options: Any
) -> PreTrainedModel:
    """Load a model of transformers from safetensors, and refuse one of which weights are missing.

    Weights are not looked at one by one: numbers that are not finite show in the first loss.

    Args:
        kind: an auto class of transformers, such as `AutoModelForCausalLM`.
        source: hub name or local folder.
        revision: revision on the hub.
        trust_remote_code: let the folder run its own code.
        **options: more arguments of `from_pretrained`.

    Raises:
        UserError: if the folder leads outside of itself, if its weights are no safetensors files, damaged, or not those
            of such a model, or if it needs code of its own that is not trusted.
    """
    check_source(source, revision)
    if Path(source).is_dir():
        weight_files(source)
    trusted = {"revision": revision, "trust_remote_code": trust_remote_code, "use_safetensors": True}
    try:
        loaded, report = kind.from_pretrained(source, **trusted, **options, output_loading_info=True)
    except Exception as error:  # transformers documents none, and files of others can hold anything
        raise _not_loadable("model", source, error) from error
    if report["missing_keys"]:
        missing, wanted = min(report["missing_keys"]), type(loaded).__name__
        raise UserError(
            f"{source} lacks the weight {missing} of a {wanted}; get the folder anew, or name a model of that kind."
        )
    model: PreTrainedModel = loaded
    return model


def load_config(source: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The configuration of a model; see :func:`load_pretrained` for arguments and errors."""
    check_source(source, revision)
    try:
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # as there
        raise _not_loadable("configuration", source, error) from error


def context_length(config: Any) -> int:
    """Tokens that a model of this configuration takes; `sys.maxsize` where it gives no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def load_causal_lm(
    model: str,
    settings: BackboneSettings,
    dtype: torch.dtype,
    quantized: bool = False,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Load a causal language model with dropout off and neutral generation settings.

    Sampling defaults that a model ships with (temperature, top-p, repetition penalty) would make rollouts
    come from another distribution than the one that is scored, so they are dropped here.

    Args:
        model: hub name or local folder.
        settings: revision, attention, trust and checkpointing of the run.
        dtype: data type of the weights.
        quantized: hold the weights as NF4 with double quantization.
        device: where to put quantized weights; others are moved by the trainer.

    Raises:
        UserError: if the model cannot be loaded, or 4-bit weights do not work on the device.
    """
    if quantized:
        check_quantization(device or torch.device("cpu"), dtype)
    revision = settings.revision if model == settings.model else None
    config = load_config(model, revision, settings.trust_remote_code)
    switch_dropout_off(config)
    options: dict[str, Any] = {"config": config, "dtype": dtype, "attn_implementation": settings.attention}
    if quantized:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        options["device_map"] = {"": device or torch.device("cpu")}
    loaded = load_pretrained(AutoModelForCausalLM, model, revision, settings.trust_remote_code, **options)
    if quantized:
        _keep_quantized_weights_differentiable(loaded)
    loaded.generation_config = GenerationConfig()
    loaded.requires_grad_(False)
    loaded.train()  # gradient checkpointing asks for it; with dropout off it changes nothing else
    if settings.gradient_checkpointing:
        loaded.gradient_checkpointing_enable({"use_reentrant": False})
    _check_plain_output_layer(loaded)
    return loaded


def check_tokenizer(model: PreTrainedModel, source: str, chat: ChatTokenizer) -> None:
    """Raise UserError if a model, loaded from `source`, has no embedding for some token of the tokenizer."""
    rows: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[assignment, index]
    if rows < len(chat.tokenizer):
        raise UserError(
            f"the tokenizer of {source} has {len(chat.tokenizer)} tokens but its model embeds only {rows}; use the "
            "tokenizer that belongs to the model."
        )


def check_same_vocabulary(role: str, source: str, chat: ChatTokenizer, settings: BackboneSettings) -> None:
    """Raise UserError if an outside model, which shall play a role, has other tokens than the base model."""
    template = settings.chat_template or "plain"
    if load_chat_tokenizer_from(source, None, template, settings.trust_remote_code).fingerprint != chat.fingerprint:
        raise UserError(
            f"the {role} role {source} has another vocabulary than the base model {settings.model}; token rewards and "
            "log-probabilities need the same one."
        )


def save_model(
    model: PreTrainedModel,
    folder: Path,
    weights: dict[str, Tensor] | None,
    chat: ChatTokenizer,
    max_shard_size: str = "50GB",
) -> None:
    """Write a Hugging Face model folder, whose generation settings name the stop ids that loading took off.

    Args:
        model: gives the structure.
        folder: exists.
        weights: the model's, by name; None takes them from it.
        chat: knows the stop ids.
        max_shard_size: the largest file.
    """
    neutral = model.generation_config
    model.generation_config = GenerationConfig(
        eos_token_id=list(chat.stop_ids), pad_token_id=chat.pad_id, bos_token_id=chat.tokenizer.bos_token_id
    )
    model.save_pretrained(folder, state_dict=weights, max_shard_size=max_shard_size)
    model.generation_config = neutral


def check_quantization(device: torch.device, dtype: torch.dtype) -> None:
    """Quantize a small layer on a device and take a gradient through it, before a whole model is loaded.

    Args:
        device: where the 4-bit weights will be.
        dtype: in which they compute.

    Raises:
        UserError: if bitsandbytes is missing or too old, or its 4-bit weights do not work on the device.
    """
    way_out = "or set model.backbone.quantization to null"
    try:
        linear: Any = importlib.import_module("bitsandbytes").nn.Linear4bit
        installed = version("bitsandbytes")
    except Exception as error:  # a broken installation raises more than ImportError
        raise UserError(
            f"quantization nf4 needs bitsandbytes, which cannot be imported ({first_line(error)}); install it by "
            f"`pip install 'bitsandbytes>={BITSANDBYTES}'`, {way_out}."
        ) from error
    if Version(installed) < Version(BITSANDBYTES):
        raise UserError(
            f"quantization nf4 needs bitsandbytes {BITSANDBYTES} or newer and {installed} is installed; run "
            f"`pip install -U bitsandbytes`, {way_out}."
        )
    try:
        with torch.random.fork_rng(devices=[]):  # its weights are drawn, and the run's draws shall not depend on that
            layer = linear(64, 64, bias=False, compute_dtype=dtype, quant_type="nf4").to(device)
        inputs = torch.ones(1, 64, dtype=dtype, device=device, requires_grad=True)
        layer(inputs).sum().backward()
        with torch.no_grad():
            layer(inputs)  # one token at a time has kernels of its own
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # a kernel that the card does not have fails here, not later
    except Exception as error:  # bitsandbytes, torch and the driver each have their own
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise UserError(
            f"bitsandbytes {installed} cannot compute with 4-bit weights on {name} ({first_line(error)}); choose "
            f"another trainer.accelerator (gpu for a newer NVIDIA card, or cpu), {way_out}."
        ) from error


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def switch_dropout_off(config: Any) -> None:
    """Dropout and router noise would make old and new log-probabilities differ before any update."""
    random = ("dropout", "pdrop", "dropout_prob", "jitter_noise")
    for name, value in vars(config).items():
        if isinstance(value, float) and (name.endswith(random) or "_dropout" in name):
            setattr(config, name, 0.0)


def _keep_quantized_weights_differentiable(model: nn.Module) -> None:
    """On CPUs with AVX512-BF16 one inference forward would repack NF4 weights into a layout without gradients."""
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _check_plain_output_layer(model: PreTrainedModel) -> None:
    """Log-probabilities apply the output layer to the hidden states directly; a model that does more is refused."""
    config = model.config.get_text_config()
    if config.model_type == "phimoe":
        raise UserError(
            "phimoe models route tokens at random while they train, so that no two forwards agree; use another model "
            "family."
        )
    capped = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    for name in (*capped, "logit_scale", "logits_scaling", "lm_head_multiplier"):
        if getattr(config, name, None) not in (None, 1.0):
            raise UserError(
                f"{config.model_type} models change their logits after the output layer ({name}), which "
                "rto-lightning does not reproduce yet; use another model family."
            )


def _not_loadable(what: str, model: str, error: Exception) -> UserError:
    if not Path(model).exists() and not looks_like_hub_name(model):
        return UserError(
            f"the folder {model} does not exist; set model.backbone.model to a local folder or a hub name (owner/name)."
        )
    if "trust_remote_code" in str(error):
        return UserError(
            f"the {what} of {model} needs code that its folder brings along, which is not run; use another model (for "
            "a base model whose code you have read: model.backbone.trust_remote_code, or export --trust_remote_code)."
        )
    other_sizes = "mismatched_sizes" in str(error)  # where transformers logs them and names its own argument
    reason = "its weights have other sizes than its config.json says" if other_sizes else first_line(error)
    return UserError(f"the {what} of {model} could not be loaded ({reason}); get it anew, or name another one.")
