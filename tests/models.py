"""Tiny random models with the tokenizer of `tests.tiny`, as folders that load like those of a hub."""

from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rto_lightning.backbone import BackboneSettings, LoraSettings, PolicyBackbone, Sequences, load_chat_tokenizer
from tests.tiny import tiny_tokenizer

LORA = LoraSettings(rank=4, alpha=8)


def tiny_config(**changes: object) -> LlamaConfig:
    """Two layers of width 32 over the 259 tokens of the byte tokenizer."""
    settings = dict(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,
        attention_dropout=0.5,  # must be switched off by the backbone
        pad_token_id=2,
        eos_token_id=2,
        bos_token_id=1,
    )
    return LlamaConfig(**{**settings, **changes})


def write_tiny_model(folder: Path, seed: int = 0, **changes: object) -> Path:
    """A causal language model with sampling defaults that would distort rollouts if they were kept."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(**changes))
    model.generation_config = GenerationConfig(
        eos_token_id=2, pad_token_id=2, do_sample=True, top_k=1, temperature=0.1, repetition_penalty=5.0
    )
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_tiny_neox(folder: Path, seed: int = 0) -> Path:
    """A causal language model of Pythia's architecture, whose output layer is no copy of the embedding."""
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        pad_token_id=2,
        eos_token_id=2,
        bos_token_id=1,
    )
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer(template=False).save_pretrained(folder)
    return folder


def write_tiny_qwen2(folder: Path, seed: int = 0) -> Path:
    """A causal language model of Qwen2.5's architecture: biases on queries, keys and values, and tied embeddings."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=2,
        eos_token_id=2,
        bos_token_id=1,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_tiny_classifier(folder: Path, seed: int = 0) -> Path:
    """An outside reward model: sequence classification with one label."""
    torch.manual_seed(seed)
    LlamaForSequenceClassification(tiny_config(num_labels=1, hidden_size=16)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def backbone_settings(folder: Path, **changes: object) -> BackboneSettings:
    """Settings for exact comparisons: float64, small chunks."""
    defaults = dict(lora=LORA, dtype="float64", logprob_chunk_tokens=5)
    return BackboneSettings(str(folder), **{**defaults, **changes})  # type: ignore[arg-type]


def make_backbone(folder: Path, **changes: object) -> PolicyBackbone:
    """A backbone without roles."""
    settings = backbone_settings(folder, **changes)
    return PolicyBackbone(settings, load_chat_tokenizer(settings))


def some_sequences() -> Sequences:
    """Three prompts and responses of different lengths; padding looks like the stop id 2."""
    prompts = [[1, 40, 41, 42, 43, 44], [1, 50, 51], [1, 60]]
    responses = [[70, 71, 2], [80, 81, 82, 83, 2], [90]]
    return Sequences.from_lists(prompts, responses, pad_id=2)


def randomize(parameters: list[torch.nn.Parameter], seed: int = 0, scale: float = 0.1) -> None:
    """Give fresh adapters, which start as zero, something to say."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
