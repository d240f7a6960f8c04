"""Load a base model and its tokenizer from a hub name or a local folder."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
)

from rto_lightning.backbone.chat import ChatTokenizer
from rto_lightning.backbone.roles import looks_like_hub_name
from rto_lightning.backbone.settings import BackboneSettings
from rto_lightning.errors import UserError


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
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, **options)
    except (OSError, ValueError) as error:
        raise _not_loadable("tokenizer", model, error) from error
    try:
        generation = GenerationConfig.from_pretrained(model, revision=revision or "main")
    except OSError:  # a model without generation_config.json stops at the tokenizer's EOS
        generation = GenerationConfig()
    return ChatTokenizer(tokenizer, _as_list(generation.eos_token_id), chat_template, model)


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
        UserError: if the model cannot be loaded.
    """
    options: dict[str, Any] = {
        "revision": settings.revision if model == settings.model else None,
        "trust_remote_code": settings.trust_remote_code,
    }
    try:
        config = AutoConfig.from_pretrained(model, **options)
        _switch_dropout_off(config)
        if quantized:
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
            options["device_map"] = {"": device or torch.device("cpu")}
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            model, config=config, dtype=dtype, attn_implementation=settings.attention, use_safetensors=True, **options
        )
    except (OSError, ValueError, ImportError) as error:
        raise _not_loadable("model", model, error) from error
    if quantized:
        _keep_quantized_weights_differentiable(loaded)
    loaded.generation_config = GenerationConfig()
    loaded.requires_grad_(False)
    loaded.train()  # gradient checkpointing asks for it; with dropout off it changes nothing else
    if settings.gradient_checkpointing:
        loaded.gradient_checkpointing_enable({"use_reentrant": False})
    _check_plain_output_layer(loaded)
    return loaded


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _switch_dropout_off(config: Any) -> None:
    """Dropout would make old and new log-probabilities differ before any update."""
    for name, value in vars(config).items():
        if isinstance(value, float) and (name.endswith(("dropout", "pdrop", "dropout_prob")) or "_dropout" in name):
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
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier"):
        if getattr(config, name, None) not in (None, 1.0):
            raise UserError(
                f"{config.model_type} models change their logits after the output layer ({name}), which "
                "rto-lightning does not reproduce yet; use another model family."
            )


def _not_loadable(what: str, model: str, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if not Path(model).exists() and not looks_like_hub_name(model):
        return UserError(
            f"the folder {model} does not exist; set model.backbone.model to a local folder or a hub name (owner/name)."
        )
    return UserError(f"the {what} of {model} could not be loaded: {reason}")
