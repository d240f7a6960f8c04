"""Several adapters on one base: what PEFT's own switches get wrong, and what a saved one holds."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rto_lightning.errors import UserError
from rto_lightning.rollout import RolloutSettings, TransformersEngine
from tests.models import make_backbone, randomize, some_sequences, write_tiny_model


@pytest.fixture
def backbone(tiny_model):
    backbone = make_backbone(tiny_model)
    backbone.add_role("reference")
    backbone.add_role("policy", trainable=True)
    backbone.add_role("critic", trainable=True, scalar_head=True)
    for number, role in enumerate(("policy", "critic")):
        randomize(backbone.trained_parameters(role), number)
    return backbone


def test_policy_and_critic_both_get_gradients(backbone):
    sequences = some_sequences()
    logprobs, _ = backbone.token_logprobs("policy", sequences)
    values = backbone.token_values("critic", sequences)
    (logprobs.sum() + values.sum()).backward()
    for role in ("policy", "critic"):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in backbone.trained_parameters(role)), role


def test_gradients_survive_rollout_and_reference_forward(backbone):
    sequences = some_sequences()
    width = sequences.prompt_width
    engine = TransformersEngine(backbone, RolloutSettings(max_new_tokens=2))
    engine.rollout("policy", sequences.input_ids[:, :width], sequences.attention_mask[:, :width], [0, 1, 2])
    with torch.no_grad():
        backbone.token_logprobs("reference", sequences)
    logprobs, _ = backbone.token_logprobs("policy", sequences)
    with backbone.play("policy"):
        logprobs.sum().backward()
    assert all(p.grad is not None for p in backbone.trained_parameters("policy"))
    assert all(p.grad is None for p in backbone.trained_parameters("critic"))


def test_only_adapters_and_heads_are_trainable(backbone):
    trained = {id(p) for role in ("policy", "critic") for p in backbone.trained_parameters(role)}
    assert {id(p) for p in backbone.parameters() if p.requires_grad} == trained
    assert backbone.trained_parameters("reference") == []


def test_play_nests_and_restores(backbone):
    sequences = some_sequences()
    outside, _ = backbone.token_logprobs("policy", sequences)
    with backbone.play("critic"):
        inside, _ = backbone.token_logprobs("policy", sequences)
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)


def test_adding_a_role_later_keeps_the_others_trainable(backbone):
    backbone.add_role("late", trainable=True)
    backbone.copy_role("policy", "frozen", trainable=False)
    for role in ("policy", "critic", "late"):
        assert all(p.requires_grad for p in backbone.trained_parameters(role)), role
    frozen = backbone.adapters.parameters("frozen")
    assert frozen and not any(p.requires_grad for p in frozen)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_a_single_adapter(tiny_model, checkpointing):
    """With and without recomputation in the backward pass, and with other adapters beside it."""
    alone = make_backbone(tiny_model)
    alone.add_role("policy", trainable=True)
    randomize(alone.trained_parameters("policy"))
    sequences = some_sequences()
    alone.token_logprobs("policy", sequences)[0].sum().backward()

    crowd = make_backbone(tiny_model, gradient_checkpointing=checkpointing)
    crowd.add_role("critic", trainable=True, scalar_head=True)
    crowd.add_role("policy", trainable=True)
    randomize(crowd.trained_parameters("critic"), 7)
    with torch.no_grad():
        for parameter, same in zip(crowd.trained_parameters("policy"), alone.trained_parameters("policy"), strict=True):
            parameter.copy_(same)
    crowd.train()
    logprobs, _ = crowd.token_logprobs("policy", sequences)
    with crowd.play("policy"):
        logprobs.sum().backward()
    for expected, parameter in zip(alone.trained_parameters("policy"), crowd.trained_parameters("policy"), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=0, atol=1e-12)
    assert all(p.grad is None for p in crowd.trained_parameters("critic"))


def test_saved_adapter_loads_in_plain_peft(backbone, tiny_model, tmp_path):
    backbone.save_role("policy", tmp_path / "role", backbone.card("policy", "policy", {}))
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64), str(tmp_path / "role")
    )
    ids = torch.tensor([[1, 40, 41, 42]])
    with torch.no_grad(), backbone.play("policy") as model:
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=1e-5)


def test_trained_weights_are_float32_on_a_bfloat16_base(tiny_model):
    backbone = make_backbone(tiny_model, dtype="bfloat16")
    backbone.add_role("policy", trainable=True)
    backbone.add_role("critic", trainable=True, scalar_head=True)
    trained = backbone.trained_parameters("policy") + backbone.trained_parameters("critic")
    assert {p.dtype for p in trained} == {torch.float32}
    frozen = [p for p in backbone.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == {torch.bfloat16}


def test_nf4_base_trains_after_a_rollout(tiny_model):
    """On some CPUs one inference forward repacks NF4 weights into a layout without gradients."""
    backbone = make_backbone(tiny_model, dtype="float32", quantization="nf4")
    backbone.add_role("policy", trainable=True)
    sequences = some_sequences()
    with torch.no_grad():
        before, _ = backbone.token_logprobs("policy", sequences)
    optimizer = torch.optim.SGD(backbone.trained_parameters("policy"), lr=0.01)
    logprobs, _ = backbone.token_logprobs("policy", sequences)
    with backbone.play("policy"):
        (-logprobs.sum()).backward()
    optimizer.step()
    after, _ = backbone.token_logprobs("policy", sequences)
    assert after.sum() > before.sum()


def test_adapter_of_another_shape_is_refused(tiny_model, tmp_path, backbone):
    backbone.save_role("policy", tmp_path / "role", backbone.card("policy", "policy", {}))
    (tmp_path / "role" / "role.json").unlink()  # as a plain PEFT folder, nothing but the shapes can tell
    other = make_backbone(write_tiny_model(tmp_path / "wide", hidden_size=64))
    with pytest.raises(UserError, match="does not fit the base model"):
        other.add_role("dpo", str(tmp_path / "role"))


def test_layers_that_do_not_exist_are_one_sentence(tiny_model):
    from rto_lightning.backbone import LoraSettings

    backbone = make_backbone(tiny_model, lora=LoraSettings(target_modules=["no_such_layer"]))
    with pytest.raises(UserError, match="no_such_layer"):
        backbone.add_role("policy", trainable=True)


def test_half_an_adapter_is_refused(backbone, tiny_model, tmp_path):
    backbone.save_role("policy", tmp_path / "role", backbone.card("policy", "policy", {}))
    from safetensors.torch import load_file, save_file

    path = tmp_path / "role" / "adapter_model.safetensors"
    weights = load_file(path)
    save_file(dict(list(weights.items())[: len(weights) // 2]), path)
    with pytest.raises(UserError, match="lacks weights for"):
        make_backbone(tiny_model).add_role("policy", str(tmp_path / "role"))


def test_a_saved_adapter_names_the_revision_of_its_base(tiny_model, tmp_path):
    backbone = make_backbone(tiny_model)
    backbone.add_role("policy", trainable=True)
    backbone.adapters.save("policy", tmp_path, "v2")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["revision"] == "v2"
