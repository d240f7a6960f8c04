"""Folders and files that try to run code, to reach outside of themselves, or to be taken for what they are not.

Each function takes a good folder, which is writable and lies in a folder of its own, and spoils it. What would run code
makes a folder called `PWNED` beside it.
"""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ADAPTER = "adapter_model.safetensors"
PWNED = "PWNED"


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place),)


def payload(folder: Path) -> Payload:
    return Payload(folder.resolve().parent / PWNED)


def code(folder: Path) -> str:
    """A module that runs code when it is imported."""
    return f"import os\nos.mkdir({str(folder.resolve().parent / PWNED)!r})\n"


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def header(path: Path, text: str, body: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + body)


def linked_outside(folder: Path, name: str) -> None:
    """The file is elsewhere, and a link to it in its place."""
    outside = folder.parent / "outside"
    outside.mkdir()
    shutil.move(folder / name, outside / name)
    (folder / name).symlink_to(outside / name)


def pickled(folder: Path, name: str, instead_of: str) -> None:
    (folder / instead_of).unlink()
    torch.save({"weight": payload(folder)}, folder / name)


def first_weight(tensors: dict[str, torch.Tensor]) -> str:
    return min(tensors)


def _indexed_outside(folder: Path, name: str) -> None:
    """The weights are in another folder, which an index names."""
    linked_outside(folder, "model.safetensors")
    (folder / "model.safetensors").unlink()
    tensors = load_file(folder.parent / "outside" / "model.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, name.format(parent=folder.parent))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _another_format(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(payload(folder)))
    change_json(folder / "config.json", transformers_weights="pytorch_model.bin")


def _own_code(folder: Path, file: str, **settings: Any) -> None:
    (folder / "custom.py").write_text(code(folder) + "class Custom:\n    pass\n")
    change_json(folder / file, **settings)


def _custom_generate(folder: Path) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(
        code(folder) + "def generate(model, **options):\n    pass\n"
    )


AUTO_MAP = {name: "custom.Custom" for name in ("AutoConfig", "AutoModelForCausalLM")}

ADAPTERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pickled weights": (
        lambda f: pickled(f, "adapter_model.bin", ADAPTER),
        "has no adapter_model.safetensors; .*convert",
    ),
    "module to import": (
        lambda f: change_json(f / "adapter_config.json", megatron_config={"a": 1}, megatron_core="antigravity"),
        "not a plain LoRA adapter .megatron_config is set",
    ),
    "another kind of adapter": (
        lambda f: change_json(f / "adapter_config.json", peft_type="LOHA"),
        "only LoRA is loaded",
    ),
    "changes the base": (
        lambda f: change_json(f / "adapter_config.json", init_lora_weights="pissa"),
        "would change the base model .init_lora_weights is 'pissa'",
    ),
    "trains biases": (lambda f: change_json(f / "adapter_config.json", bias="all"), "bias is set"),
    "copies layers": (
        lambda f: change_json(f / "adapter_config.json", layer_replication=[[0, 2]]),
        "layer_replication",
    ),
    "replaces modules": (
        lambda f: change_json(f / "adapter_config.json", modules_to_save=["lm_head"]),
        "modules_to_save",
    ),
    "enormous rank": (lambda f: change_json(f / "adapter_config.json", r=10**9), "names the rank 1000000000"),
    "rank by pattern": (
        lambda f: change_json(f / "adapter_config.json", rank_pattern={"q_proj": 4096}),
        "the rank 4096",
    ),
    "rank of text": (lambda f: change_json(f / "adapter_config.json", r="4"), "does not describe a LoRA adapter"),
    "pattern that is none": (
        lambda f: change_json(f / "adapter_config.json", target_modules="(unclosed"),
        "cannot be put on",
    ),
    "scale that is not finite": (
        lambda f: change_json(f / "adapter_config.json", lora_alpha=float("nan")),
        "does not describe a LoRA adapter",
    ),
    "a weight of the base": (
        lambda f: change_tensors(
            f / ADAPTER, lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(32)})
        ),
        "has the weight base_model.model.model.norm.weight, which is none of a LoRA adapter",
    ),
    "weights that are not finite": (
        lambda f: change_tensors(f / ADAPTER, lambda t: t[first_weight(t)].fill_(torch.nan)),
        "not finite",
    ),
    "weights of integers": (
        lambda f: change_tensors(
            f / ADAPTER, lambda t: t.update({first_weight(t): t[first_weight(t)].to(torch.int32)})
        ),
        "no data type of weights",
    ),
    "weights of another shape": (
        lambda f: change_tensors(f / ADAPTER, lambda t: t.update({first_weight(t): torch.ones(4, 7)})),
        "does not fit the base model",
    ),
    "header of 10 GB": (
        lambda f: (f / ADAPTER).write_bytes(struct.pack("<Q", 10 * 2**30) + b"{}"),
        "no whole safetensors",
    ),
    "shorter than its header says": (
        lambda f: header(f / ADAPTER, '{"a":{"dtype":"F32","shape":[99],"data_offsets":[0,396]}}'),
        "no whole safetensors",
    ),
    "a name twice in the header": (
        lambda f: header(
            f / ADAPTER, '{"a":%s,"a":%s}' % (2 * ('{"dtype":"F32","shape":[1],"data_offsets":[0,4]}',)), b"1234"
        ),
        "the key 'a' stands in it twice",
    ),
    "weights behind a link": (lambda f: linked_outside(f, ADAPTER), "is a link out of its folder"),
    "settings behind a link": (lambda f: linked_outside(f, "adapter_config.json"), "is a link out of its folder"),
    "role.json behind a link": (lambda f: linked_outside(f, "role.json"), "is a link out of its folder"),
    "a link to nothing": (lambda f: (f / "tokenizer.model").symlink_to("nowhere"), "is a link that leads nowhere"),
    "a link to itself": (lambda f: (f / "loop").symlink_to("loop"), "is a link that leads nowhere"),
    "a device": (lambda f: os.mkfifo(f / "generation_config.json"), "is no regular file"),
    "role.json that is a list": (lambda f: (f / "role.json").write_text("[1]"), "holds no JSON object"),
    "role.json of 100 MB": (lambda f: (f / "role.json").write_text(" " * 10**8), "too many for settings"),
    "role.json nested without end": (lambda f: (f / "role.json").write_text("[" * 200_000), "cannot be read"),
    "role.json with a key twice": (lambda f: (f / "role.json").write_text('{"role": "dpo", "role": "dpo"}'), "twice"),
    "role.json without a key": (
        lambda f: (f / "role.json").write_text('{"format": 1, "role": "dpo"}'),
        "it has no kind",
    ),
    "role.json with a list for a name": (
        lambda f: change_json(f / "role.json", base_model=["a"]),
        "it has no base_model",
    ),
    "role.json with unknown keys": (lambda f: change_json(f / "role.json", command="x"), "the unknown key 'command'"),
    "role.json of another kind": (lambda f: change_json(f / "role.json", kind="model"), "holds the kind model"),
    "adapter_config.json that is text": (lambda f: (f / "adapter_config.json").write_text("<html>"), "cannot be read"),
    "adapter_config.json in Latin-1": (
        lambda f: (f / "adapter_config.json").write_bytes(b'{"a":"\xe9"}'),
        "cannot be read",
    ),
}
"""Spoil the folder of a DPO role, an adapter; and what the refusal says."""

MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pickled weights": (lambda f: pickled(f, "pytorch_model.bin", "model.safetensors"), "as pytorch_model.bin only"),
    "pickled weights by name": (_another_format, "names the weights pytorch_model.bin"),
    "code for its configuration": (
        lambda f: _own_code(f, "config.json", auto_map=AUTO_MAP, model_type="custom"),
        "needs code that its folder brings along, which is not run",
    ),
    "weights in another folder": (
        lambda f: _indexed_outside(f, "../outside/model.safetensors"),
        "names the file '../outside/model.safetensors', which is not in its folder",
    ),
    "weights at an absolute place": (
        lambda f: _indexed_outside(f, "{parent}/outside/model.safetensors"),
        "which is not in its folder",
    ),
    "weights by name elsewhere": (
        lambda f: change_json(f / "config.json", transformers_weights="../outside.safetensors"),
        "could not be loaded .`transformers_weights` must reference a file inside",
    ),
    "weights behind a link": (lambda f: linked_outside(f, "model.safetensors"), "is a link out of its folder"),
    "attention code from the hub": (
        lambda f: change_json(f / "config.json", attn_implementation="someone/kernel"),
        "asks for attention code from the hub .someone/kernel",
    ),
    "an adapter inside": (
        lambda f: (f / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}'),
        "holds an adapter, where a whole model is needed",
    ),
    "a weight less": (
        lambda f: change_tensors(f / "model.safetensors", lambda t: t.pop("model.norm.weight")),
        "lacks the weight model.norm.weight",
    ),
    "a weight of another shape": (
        lambda f: change_tensors(f / "model.safetensors", lambda t: t.update({"model.norm.weight": torch.ones(7)})),
        "other sizes than its config.json says",
    ),
    "sizes that its weights do not have": (
        lambda f: change_json(f / "config.json", hidden_size=2**20, num_attention_heads=2**10),
        "other sizes than its config.json says",
    ),
    "sizes of text": (lambda f: change_json(f / "config.json", hidden_size="many"), "could not be loaded"),
    "a header of garbage": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), "no whole safetensors"),
    "an index without files": (
        lambda f: (
            (f / "model.safetensors").unlink(),
            (f / "model.safetensors.index.json").write_text(
                '{"metadata": {}, "weight_map": {"a": "gone.safetensors"}}'
            ),
        ),
        "names gone.safetensors, which is not there",
    ),
    "an index that is a list": (
        lambda f: (
            (f / "model.safetensors").unlink(),
            (f / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": ["a"]}'),
        ),
        "has no weight_map",
    ),
    "config.json that is a number": (lambda f: (f / "config.json").write_text("7"), "holds no JSON object"),
}
"""Spoil the folder of a causal language model; and what the refusal says when its weights are loaded."""

TOKENIZERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "code for its tokenizer": (
        lambda f: _own_code(
            f, "tokenizer_config.json", auto_map={"AutoTokenizer": ["custom.Custom", None]}, tokenizer_class="Custom"
        ),
        "needs code that its folder brings along",
    ),
    "tokenizer.json behind a link": (lambda f: linked_outside(f, "tokenizer.json"), "is a link out of its folder"),
    "tokenizer.json of garbage": (lambda f: (f / "tokenizer.json").write_text("{}"), "could not be loaded"),
    "tokenizer_config.json that is a list": (
        lambda f: (f / "tokenizer_config.json").write_text("[]"),
        "holds no JSON object",
    ),
    "stop ids of text": (
        lambda f: (f / "generation_config.json").write_text('{"eos_token_id": ["a"]}'),
        "the generation_config.json of",
    ),
    "a template that looks for classes": (
        lambda f: (f / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
        "chat template of .* refuses",
    ),
    "a template that reads files": (
        lambda f: (f / "chat_template.jinja").write_text("{% include '/etc/passwd' %}"),
        "chat template of .* refuses",
    ),
}
"""Spoil the folder of a model; and what the refusal says when its tokenizer is loaded."""

HARMLESS: dict[str, Callable[[Path], Any]] = {
    "custom_generate": _custom_generate,
    "code for an architecture that transformers knows": lambda f: _own_code(f, "config.json", auto_map=AUTO_MAP),
    "a tokenizer file elsewhere": lambda f: change_json(
        f / "tokenizer_config.json", tokenizer_file="/etc/passwd", vocab_file="/etc/passwd"
    ),
    "pickled weights beside the others": lambda f: torch.save({"weight": payload(f)}, f / "pytorch_model.bin"),
    "a tokenizer that splits its own control tokens": lambda f: change_json(
        f / "tokenizer_config.json", split_special_tokens=True
    ),
}
"""Change the folder of a model so that it can be loaded all the same, and nothing of it runs."""
