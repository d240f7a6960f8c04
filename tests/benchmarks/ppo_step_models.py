"""What the contenders of the PPO step load: the model, prompts of exactly equal length, and saved roles.

No response may stop early, or the contenders would do different work. So the stop id is one that is never sampled: the
random model is built that way, and of a real model it becomes a special token that its text never has.
"""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from rto_lightning.backbone import BackboneSettings, LoraSettings, PolicyBackbone, load_chat_tokenizer
from tests.benchmarks.ppo_step_work import Measured, Work, contend
from tests.models import randomize
from tests.tiny import tiny_tokenizer

SMOLLM2 = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
)
"""SmolLM2-135M, with tied embeddings."""
TINY = dict(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)
WORDS = ("one", "two", "three", "four", "water", "river", "house", "green", "light", "small", "tree", "road", "find")


def prepare(work: Work, _: str = "") -> Measured:
    """Make the model folder, the prompts and the roles `dpo` and `reward`; runs in a process of its own."""
    if work.source is None:
        tokenizer = write_random_model(work.model, TINY if work.tiny else SMOLLM2)
    else:
        tokenizer = link_model(Path(work.source), work.model)
    write_prompts(work, tokenizer)
    for name in ("dpo", "reward"):
        save_perturbed_role(work, name)
    return {"stop": tokenizer.eos_token}


def write_random_model(folder: Path, shape: dict[str, int]) -> PreTrainedTokenizerBase:
    """A Llama of a shape with random weights that never samples its stop id.

    The first coordinate of the residual stream is 1 whatever the tokens are; the embedding, which is the output layer
    too, has 1 there for every token but the stop id, and -1 for that.
    """
    tokenizer = tiny_tokenizer()
    stop = tokenizer.eos_token_id
    config = LlamaConfig(
        **shape,  # type: ignore[arg-type]
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=stop,
        pad_token_id=stop,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[:, 0] = 1.0
        embedding[stop, 0] = -1.0
        for layer in model.get_decoder().layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.mul_(0.01)  # or 30 layers would walk the first coordinate away from 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def link_or_copy(source: Path, target: Path) -> None:
    """A second name of a file where the file system has such, else a copy of it."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def link_model(source: Path, folder: Path) -> PreTrainedTokenizerBase:
    """A folder with the weights of a model, linked, whose stop and padding id is a special token that is never sampled.

    Raises:
        SystemExit: if the tokenizer has no special token without a use.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    used = set(tokenizer.all_special_ids)
    spare = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special and i not in used]
    if not spare:
        raise SystemExit(f"The tokenizer of {source} has no unused special token to end on; take another --model.")
    stop = max(spare)
    folder.mkdir(parents=True)
    for path in source.glob("*.safetensors*"):
        link_or_copy(path.resolve(), folder / path.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    ids = {"eos_token_id": stop, "pad_token_id": stop}
    (folder / "config.json").write_text(json.dumps({**config, **ids}), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(ids), encoding="utf-8")
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.added_tokens_decoder[stop].content
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_prompts(work: Work, tokenizer: Any) -> None:
    """A batch of prompts for each iteration, as text for this project and as ids for the others."""

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    draw = random.Random(0)
    texts = [text_of_length(encode, work.prompt_tokens, draw) for _ in range(work.prompts * work.steps)]
    rows = [json.dumps({"prompt": text, "input_ids": encode(text)}) + "\n" for text in texts]
    work.prompts_file.write_text("".join(rows), encoding="utf-8")


def text_of_length(encode: Callable[[str], Sequence[int]], tokens: int, draw: random.Random) -> str:
    """Random words that are so many tokens long."""
    while True:
        words: list[str] = []
        length = 0
        while length < tokens:
            words.append(draw.choice(WORDS))
            length = len(encode(" ".join(words)))
        if length == tokens:
            return " ".join(words)


def save_perturbed_role(work: Work, name: str) -> None:
    """A fresh adapter of the contenders' shape, moved a little at random; the reward role has a head and statistics."""
    settings = backbone_settings(work)
    backbone = PolicyBackbone(settings, load_chat_tokenizer(settings))
    backbone.add_role(name, trainable=True, scalar_head=name == "reward")
    randomize(backbone.trained_parameters(name), scale=1e-3)
    card = backbone.card(name, name, {})
    if name == "reward":
        card.score_mean, card.score_std = 0.0, 1.0  # known, or the first iteration would measure them
    shutil.rmtree(work.role(name), ignore_errors=True)
    backbone.save_role(name, work.role(name), card)


def backbone_settings(work: Work) -> BackboneSettings:
    """The base model and the adapters on it, as a user sets them."""
    lora = LoraSettings(rank=work.rank, alpha=2 * work.rank)
    return BackboneSettings(str(work.model), dtype=work.dtype, lora=lora, chat_template="plain")  # type: ignore[arg-type]


if __name__ == "__main__":
    contend(prepare)
