"""Saved roles, exported by the command, load in plain PEFT and transformers and compute what they computed."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rto_lightning.backbone import LoraSettings, RoleCard
from rto_lightning.cli import main
from rto_lightning.export import export as export_module
from tests.export.oracles import classifier_scores, plain_logits, role_scores, weights
from tests.roles import save_random_role

ARCHITECTURES = ("tied", "untied", "qwen2", "neox", "bfloat16")
PLAIN_TEMPLATE = {"neox": {"chat_template": "plain"}}
LORA = LoraSettings(rank=4, alpha=8)
STABILIZED = LoraSettings(rank=4, alpha=8, rank_stabilized=True)


def role_on(models: dict[str, Path], kind: str, name: str = "policy", **changes: Any) -> tuple[Path, Path]:
    """A base model and a random role of it, in the folder `role`."""
    settings = {**PLAIN_TEMPLATE.get(kind, {}), **changes}
    return models[kind], Path(save_random_role(models[kind], Path("role"), name, **settings))


def export(*args: str) -> Path:
    assert main(["export", "role", "out", *args]) == 0
    return Path("out")


@pytest.mark.parametrize(("kind", "lora"), [*((kind, LORA) for kind in ARCHITECTURES), ("tied", STABILIZED)])
def test_an_adapter_stays_one(models, place, capsys, kind, lora):
    base, role = role_on(models, kind, lora=lora)
    folder = export()
    torch.testing.assert_close(plain_logits(base, folder), plain_logits(base, role), rtol=0, atol=0)
    assert (plain_logits(base, folder) - plain_logits(base)).abs().max() > 0.01
    config = json.loads((folder / "adapter_config.json").read_text())
    assert isinstance(config["target_modules"], list) and config["base_model_name_or_path"] == str(base)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 8, lora.rank_stabilized)
    assert all(name.startswith("base_model.model.") for name in load_file(folder / "adapter_model.safetensors"))
    assert "check: largest difference of logits" in capsys.readouterr().out


@pytest.mark.parametrize(("kind", "lora"), [*((kind, LORA) for kind in ARCHITECTURES), ("tied", STABILIZED)])
def test_a_merged_model_computes_what_the_adapter_did(models, place, kind, lora):
    base, role = role_on(models, kind, lora=lora)
    folder = export("--merge", "--dtype", "float32")
    torch.testing.assert_close(plain_logits(folder), plain_logits(base, role), rtol=0, atol=1e-4)
    card = RoleCard.read(folder)
    assert card is not None and card.kind == "model" and not (folder / "adapter_config.json").exists()


@pytest.mark.parametrize("check", [(), ("--no_check",)], ids=["check", "no_check"])
@pytest.mark.parametrize("kind", ["untied", "bfloat16"])
def test_merged_weights_are_rounded_once(models, place, kind, check):
    base, role = role_on(models, kind)
    folder = export("--merge", *check)
    merged, adapter = weights(folder), load_file(role / "adapter_model.safetensors")
    changed = 0
    for name, weight in weights(base).items():
        exact = weight.double()
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in adapter:
            exact = exact + 2.0 * adapter[f"{key}.lora_B.weight"].double() @ adapter[f"{key}.lora_A.weight"].double()
            changed += 1
        assert merged[name].dtype == torch.bfloat16
        # The sum may lie so near to the middle of two values that float32 finds it on the other side.
        assert (merged[name] != exact.bfloat16()).float().mean() < 1e-3, name
    assert changed == 14


@pytest.mark.parametrize("args", [(), ("--merge", "--dtype", "float32")], ids=["adapter", "merged"])
def test_a_role_without_a_template_stays_without_that_of_its_base(models, place, args):
    base, role = role_on(models, "tied", chat_template="plain")
    assert AutoTokenizer.from_pretrained(base).chat_template is not None
    for folder in (role, export(*args)):
        assert AutoTokenizer.from_pretrained(folder).chat_template is None
    assert "apply_chat_template" not in Path("out/README.md").read_text()


def test_a_full_disk_is_told_and_leaves_nothing(models, place, capsys, monkeypatch):
    role_on(models, "tied")

    def no_room(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export_module, "write_card", no_room)
    assert main(["export", "role", "exported"]) == 1
    told = capsys.readouterr().err
    assert "exported could not be written (No space left on device; " in told and "Traceback" not in told
    assert not list(Path(".").glob("exported*"))


def test_the_check_says_what_rounding_costs(models, place, capsys):
    base, role = role_on(models, "tied")
    folder = export("--merge")
    difference = (plain_logits(folder) - plain_logits(base, role)).abs().max().item()
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("check: ")]
    reported = float(line.split()[5].rstrip(","))
    assert reported > 1e-3 and 0.2 < reported / difference < 5  # of other tokens
    assert "rounding the weights explains all but" in line and "same likeliest token at" in line


def test_whole_models_have_tokenizer_template_and_stop_ids(models, place):
    role_on(models, "tied", mode="full")
    folder = export("--max_shard_size", "20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    config, generation = AutoConfig.from_pretrained(folder), GenerationConfig.from_pretrained(folder)
    assert str(config.dtype).endswith("bfloat16") and generation.eos_token_id == [2]
    assert generation.temperature is None and generation.repetition_penalty is None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("kind", ["tied", "untied", "neox"])
def test_a_full_model_in_float32_is_the_role(models, place, kind):
    _, role = role_on(models, kind, mode="full")
    torch.testing.assert_close(plain_logits(export("--dtype", "float32")), plain_logits(role), rtol=0, atol=0)


def test_a_full_model_is_rounded(models, place):
    _, role = role_on(models, "untied", mode="full")
    trained, written = weights(role), weights(export())
    assert trained.keys() == written.keys()
    assert all(torch.equal(written[name], weight.bfloat16()) for name, weight in trained.items())


def test_an_export_is_a_role_again(models, place):
    role_on(models, "tied")
    merged = plain_logits(export("--merge", "--dtype", "float32"))
    assert main(["export", "out", "again", "--dtype", "float32"]) == 0
    torch.testing.assert_close(plain_logits(Path("again")), merged, rtol=0, atol=0)


def test_a_reward_adapter_keeps_its_head(models, place):
    base, role = role_on(models, "tied", "reward")
    folder = export()
    assert (folder / "head.safetensors").read_bytes() == (role / "head.safetensors").read_bytes()
    assert RoleCard.read(folder) == RoleCard.read(role)
    torch.testing.assert_close(role_scores(base, str(folder)), role_scores(base, str(role)), rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "mode"), [*((kind, "adapters") for kind in ARCHITECTURES), ("untied", "full")])
def test_a_merged_reward_role_is_a_classifier(models, place, capsys, kind, mode):
    base, role = role_on(models, kind, "reward", mode=mode)
    folder = export("--merge", "--dtype", "float32")
    bias = load_file(role / "head.safetensors")["bias"]
    assert bias.abs() > 1e-3  # the class has no place for it, and says so
    assert f"lower than the role's by {bias.item():.6g}" in capsys.readouterr().out
    expected = role_scores(base, str(role), mode=mode, **PLAIN_TEMPLATE.get(kind, {}))
    for side in ("left", "right"):
        torch.testing.assert_close(classifier_scores(folder, side) + bias, expected, rtol=0, atol=1e-4)
    assert not (folder / "role.json").exists()


def test_a_classifier_does_not_pad_with_a_stop_id(models, place):
    role_on(models, "tied", "reward")
    folder = export("--merge")
    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    assert config.pad_token_id == tokenizer.pad_token_id == 0 and tokenizer.eos_token_id == 2
    assert config.architectures == ["LlamaForSequenceClassification"] and config.num_labels == 1


def test_a_base_model_may_have_moved(models, place, fails):
    base, _ = role_on(models, "tied")
    contents = json.loads(Path("role/role.json").read_text())
    Path("role/role.json").write_text(json.dumps({**contents, "base_model": "./gone"}))
    assert "the base model ./gone does not exist; say where it is now by --base_model" in fails("role", "out")
    assert "whose weights differ" in fails("role", "out", "--base_model", str(models["untied"]))
    folder = export("--base_model", str(base))
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    AutoModelForCausalLM.from_pretrained(folder)


def test_mistakes_are_told_in_one_sentence(models, place, fails):
    role_on(models, "tied")
    Path("full").mkdir()
    Path("full/file").touch()
    assert "full exists already and is not empty" in fails("role", "full")
    assert "nowhere does not exist" in fails("nowhere", "out")
    assert "holds neither role.json nor config.yaml" in fails("full", "out")
    assert "is the role policy, not reward" in fails("role", "out", "--role", "reward")
    assert "add --merge" in fails("role", "out", "--dtype", "bfloat16")
    assert "no size such as 5GB" in fails("role", "out", "--max_shard_size", "much")
    assert "--private is for --push_to_hub" in fails("role", "out", "--private")
    assert "invalid choice: 'int8'" in fails("role", "out", "--dtype", "int8")
    assert "the following arguments are required: FROM, TO; `rto-lightning export --help`" in fails()
    assert not Path("out").exists() and not Path("out.partial").exists()
