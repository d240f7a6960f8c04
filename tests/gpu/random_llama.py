"""A random Llama of any size that is quantized as it is made, and random roles for it: no download, no large file.

The bfloat16 weights of an 8B model would not fit a card of 24 GB beside anything else. So the model is laid out without
memory, and each weight matrix is drawn on the device and quantized there before the next one is drawn.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rto_lightning.backbone import BackboneSettings, LoraSettings, RoleCard, load_chat_tokenizer
from rto_lightning.backbone.fingerprints import base_fingerprint
from rto_lightning.backbone.heads import HEAD_FILE
from rto_lightning.backbone.model_files import ADAPTER_FILE
from tests.models import tiny_config
from tests.tiny import tiny_tokenizer

STD = 0.02
"""Standard deviation of the weights, as Llama's are initialised."""


def write_folder(folder: Path, changes: dict[str, Any]) -> Path:
    """A model folder with configuration and tokenizer, and a file in the place of the weights, for the fingerprint."""
    config = tiny_config(tie_word_embeddings=False, attention_dropout=0.0, **changes)
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    save_file({"random": torch.ones(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@contextmanager
def random_weights(seed: int = 0) -> Iterator[None]:
    """Within it, `AutoModelForCausalLM.from_pretrained` draws its NF4 weights in the place of reading them."""

    def from_pretrained(source: str, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
        device = torch.device(options["device_map"][""])
        settings = options["config"], options["dtype"], options["attn_implementation"]
        return nf4_llama(*settings, device, source, seed), {"missing_keys": set()}

    with mock.patch.object(AutoModelForCausalLM, "from_pretrained", from_pretrained):
        yield


def nf4_llama(
    config: LlamaConfig, dtype: torch.dtype, attention: str, device: torch.device, name: str, seed: int
) -> PreTrainedModel:
    """What transformers and bitsandbytes make of `load_in_4bit` with double quantization, with random weights.

    All linear layers but the output layer are NF4; never more than one of them exists in `dtype`.
    """
    config.name_or_path = name
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    model.name_or_path = name
    generator = torch.Generator(device).manual_seed(seed)

    def draw(like: torch.Tensor) -> torch.Tensor:
        if like.dim() == 1:
            return torch.ones(like.shape, dtype=dtype, device=device)
        return torch.randn(like.shape, dtype=dtype, device=device, generator=generator).mul_(STD)

    output_layer = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not output_layer:
            with torch.device("meta"):
                quantized = Linear4bit(
                    module.in_features, module.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
                )
            weight = Params4bit(draw(module.weight), requires_grad=False, quant_type="nf4", module=quantized)
            quantized.weight = weight.to(device)  # quantizes
            model.set_submodule(path, quantized)
    for path, module in list(model.named_modules()):
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                setattr(module, key, nn.Parameter(draw(parameter), requires_grad=False))
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):  # rotary frequencies
            model.set_submodule(path, type(module)(config=config).to(device))
    model.is_loaded_in_4bit = True  # PEFT asks for it
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    return model


def write_roles(model: Path, folder: Path, lora: LoraSettings) -> dict[str, str]:
    """Random adapters `dpo` and `reward`, saved as stages save them, without a model in memory."""
    settings = BackboneSettings(str(model))
    card = RoleCard(
        role="",
        kind="adapter",
        base_model=str(model),
        base_revision=None,
        base_fingerprint=base_fingerprint(str(model)),
        vocabulary_fingerprint=load_chat_tokenizer(settings).fingerprint,
        score_mean=0.0,
        score_std=1.0,
    )
    config = LlamaConfig.from_pretrained(model)
    with torch.device("meta"):
        shapes = PeftModel(
            LlamaForCausalLM(config),
            LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.target_modules, task_type="CAUSAL_LM"),
        )
    generator = torch.Generator().manual_seed(1)
    for role in ("dpo", "reward"):
        (folder / role).mkdir(parents=True)
        weights = {
            key: torch.randn(weight.shape, generator=generator).mul_(STD / lora.rank)
            for key, weight in get_peft_model_state_dict(shapes, save_embedding_layers=False).items()
        }
        save_file(weights, folder / role / ADAPTER_FILE)
        shapes.peft_config["default"].save_pretrained(str(folder / role))
        card.role = role
        card.write(folder / role)
    head = {"weight": torch.randn(1, config.hidden_size, generator=generator).mul_(STD), "bias": torch.zeros(1)}
    save_file(head, folder / "reward" / HEAD_FILE)
    return {role: str(folder / role) for role in ("dpo", "reward")}
