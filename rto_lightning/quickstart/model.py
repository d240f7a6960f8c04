"""A tiny random Llama with a word-level tokenizer, in the format of any Hugging Face model folder.

The rest of the quickstart loads it as it would load a model from the hub, without a network.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rto_lightning.errors import UserError
from rto_lightning.quickstart.gold import STOP
from rto_lightning.quickstart.grammar import vocabulary

PAD = "<|pad|>"
UNKNOWN = "<|unk|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class TinyModelSettings:
    """The size of the tiny language model."""

    hidden_size: int = 96
    """Width of the residual stream."""
    intermediate_size: int = 192
    """Width inside the feed-forward blocks."""
    layers: int = 2
    """Transformer blocks; two are the least that can look up in the prompt what was asked."""
    heads: int = 4
    """Attention heads, which must divide `hidden_size`."""
    max_positions: int = 128
    """Longest sequence of prompt and response in tokens; the quickstart's have at most 64."""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """The quickstart's word-level tokenizer: one token for each word and mark of the grammar, and five specials.

    The stop token ends every turn; the padding token is one of its own; there is no BOS.
    """
    specials = [PAD, UNKNOWN, STOP, USER, ASSISTANT]
    ids = {token: index for index, token in enumerate([*specials, *vocabulary()])}
    backend = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=STOP,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def write_tiny_model(directory: str | Path, seed: int = 1, settings: TinyModelSettings | None = None) -> None:
    """Write a model of random weights with its tokenizer and generation config.

    The same seed and settings give the same weights; the global random state is left as it was.

    Args:
        directory: folder to write to; made if it is not there.
        seed: seed of the random weights.
        settings: size of the model.

    Raises:
        UserError: if the folder already holds a model, or the heads do not divide the width.
    """
    directory = Path(directory)
    settings = settings or TinyModelSettings()
    if (directory / "config.json").exists():
        raise UserError(f"{directory} already holds a model; remove it or choose another folder.")
    if settings.hidden_size % (2 * settings.heads) != 0:
        raise UserError(
            f"hidden_size {settings.hidden_size} is not a multiple of twice the {settings.heads} heads; "
            "choose another width or another number of heads."
        )
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.max_positions,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    model.save_pretrained(directory, safe_serialization=True)
    tokenizer.save_pretrained(directory)
