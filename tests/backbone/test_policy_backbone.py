"""Roles: what they compute, how they start, how they are saved and what is refused."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from rto_lightning.backbone import Sequences
from rto_lightning.backbone.fingerprints import base_fingerprint
from rto_lightning.errors import MissingInputError, UserError
from tests.models import make_backbone, randomize, some_sequences, write_tiny_model

MODES = ["adapters", "full"]


def _plain_logprobs(model, sequences, row):
    """Log-probabilities of one row without padding, by transformers alone."""
    keep = sequences.attention_mask[row].bool()
    ids = sequences.input_ids[row][keep][None]
    length = int(sequences.response_lengths[row])
    with torch.no_grad():
        logits = model(ids).logits.log_softmax(-1)
    return logits[0, -length - 1 : -1].gather(-1, ids[0, -length:, None]).squeeze(-1)


@pytest.mark.parametrize("mode", MODES)
def test_logprobs_are_those_of_transformers_without_padding(tiny_model, mode):
    backbone = make_backbone(tiny_model, mode=mode)
    backbone.add_role("reference")
    sequences = some_sequences()
    with torch.no_grad():
        logprobs, entropy = backbone.token_logprobs("reference", sequences, with_entropy=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    model.eval()
    for row in range(3):
        length = int(sequences.response_lengths[row])
        torch.testing.assert_close(logprobs[row, :length], _plain_logprobs(model, sequences, row), rtol=0, atol=1e-12)
        assert (logprobs[row, length:] == 0).all() and (entropy[row, length:] == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_policy_starts_as_the_reference(tiny_model, mode):
    backbone = make_backbone(tiny_model, mode=mode)
    backbone.add_role("reference")
    backbone.add_role("policy", trainable=True)
    policy, _ = backbone.token_logprobs("policy", some_sequences())
    reference, _ = backbone.token_logprobs("reference", some_sequences())
    assert torch.equal(policy, reference)
    assert policy.requires_grad and not reference.requires_grad


@pytest.mark.parametrize("mode", MODES)
def test_training_the_policy_leaves_the_reference(tiny_model, mode):
    backbone = make_backbone(tiny_model, mode=mode)
    backbone.add_role("reference")
    backbone.add_role("policy", trainable=True)
    before, _ = backbone.token_logprobs("reference", some_sequences())
    randomize(backbone.trained_parameters("policy"))
    after, _ = backbone.token_logprobs("reference", some_sequences())
    moved, _ = backbone.token_logprobs("policy", some_sequences())
    assert torch.equal(before, after)
    assert not torch.allclose(moved, before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("role", ["dpo", "reward"])
def test_saved_role_is_the_same_when_loaded(tiny_model, tmp_path, mode, role):
    backbone = make_backbone(tiny_model, mode=mode, dtype="float32")
    backbone.add_role("policy", trainable=True, scalar_head=role == "reward")
    randomize(backbone.trained_parameters("policy"))
    backbone.save_role("policy", tmp_path / "role", backbone.card("policy", role, {"beta": 0.1}))

    loaded = make_backbone(tiny_model, mode=mode, dtype="float32")
    loaded.add_role(role, str(tmp_path / "role"), scalar_head=role == "reward")
    sequences = some_sequences()
    with torch.no_grad():
        assert torch.equal(backbone.token_logprobs("policy", sequences)[0], loaded.token_logprobs(role, sequences)[0])
        if role == "reward":
            scores = loaded.sequence_scores(role, sequences)
            assert torch.equal(backbone.sequence_scores("policy", sequences), scores)
            assert scores.std() > 0
    assert loaded.cards[role].settings == {"beta": 0.1}
    assert not any(p.requires_grad for p in loaded.parameters())


def test_saved_full_model_generates_and_stops_in_plain_transformers(tiny_model, tmp_path):
    backbone = make_backbone(tiny_model, mode="full", dtype="float32")
    backbone.add_role("policy", trainable=True)
    backbone.save_role("policy", tmp_path / "role", backbone.card("policy", "policy", {}))
    assert GenerationConfig.from_pretrained(tmp_path / "role").eos_token_id == [2]
    assert (tmp_path / "role" / "model.safetensors").exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "role").config.vocab_size == 259


def test_full_model_beside_an_adapter_policy(tiny_model, tmp_path):
    """A full-weight DPO model with a LoRA policy: a copy of its own, frozen."""
    outside = write_tiny_model(tmp_path / "dpo", seed=5)
    backbone = make_backbone(tiny_model)
    backbone.add_role("policy", trainable=True)
    backbone.add_role("dpo", str(outside))
    assert backbone.roles["dpo"].model == "dpo"
    sequences = some_sequences()
    logprobs, _ = backbone.token_logprobs("dpo", sequences)
    model = AutoModelForCausalLM.from_pretrained(outside, dtype=torch.float64).eval()
    torch.testing.assert_close(logprobs[0, :3], _plain_logprobs(model, sequences, 0), rtol=0, atol=1e-12)


def test_scores_read_the_last_response_token(tiny_model):
    backbone = make_backbone(tiny_model)
    backbone.add_role("reward", trainable=True, scalar_head=True)
    randomize(backbone.trained_parameters("reward"))
    sequences = some_sequences()
    with torch.no_grad():
        together = backbone.sequence_scores("reward", sequences)
        for row in range(3):
            keep = sequences.attention_mask[row].bool()
            ids = sequences.input_ids[row][keep][None]
            with backbone.play("reward") as model:
                hidden = model.get_decoder()(ids).last_hidden_state
            expected = backbone.head("reward")(hidden[0, -1])
            torch.testing.assert_close(together[row], expected, rtol=0, atol=1e-12)


def test_values_read_the_state_before_each_token(tiny_model):
    """A value may not depend on the token that is about to be chosen."""
    backbone = make_backbone(tiny_model)
    backbone.add_role("critic", trainable=True, scalar_head=True)
    randomize(backbone.trained_parameters("critic"))
    sequences = some_sequences()
    changed = sequences.input_ids.clone()
    changed[0, -5 + 2] = 99  # the third and last token of the first response
    other = type(sequences)(changed, sequences.attention_mask, sequences.response_mask)
    with torch.no_grad():
        values, new_values = backbone.token_values("critic", sequences), backbone.token_values("critic", other)
    assert torch.equal(values, new_values)
    assert (values[sequences.response_mask] != 0).all()
    assert (values[~sequences.response_mask] == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_critic_from_the_reward_role_in_normalised_units(tiny_model, mode):
    backbone = make_backbone(tiny_model, mode=mode)
    backbone.add_role("reward", trainable=True, scalar_head=True)
    randomize(backbone.trained_parameters("reward"))
    backbone.copy_role("reward", "critic", trainable=True, scalar_head=True)
    backbone.head("critic").rescale(mean=2.0, std=4.0)
    sequences = some_sequences()
    with torch.no_grad():
        scores = backbone.sequence_scores("reward", sequences)
        critic = backbone.sequence_scores("critic", sequences)
    torch.testing.assert_close(critic, (scores - 2.0) / 4.0, rtol=0, atol=1e-12)


def test_dropout_is_off_even_in_training_mode(tiny_model):
    backbone = make_backbone(tiny_model)
    backbone.add_role("policy", trainable=True)
    backbone.train()
    first, _ = backbone.token_logprobs("policy", some_sequences())
    second, _ = backbone.token_logprobs("policy", some_sequences())
    assert torch.equal(first, second)


def test_role_of_another_base_is_refused_with_both_names(tiny_model, tmp_path):
    other = write_tiny_model(tmp_path / "other", seed=9)
    trained = make_backbone(other)
    trained.add_role("policy", trainable=True)
    trained.save_role("policy", tmp_path / "dpo", trained.card("policy", "dpo", {}))
    with pytest.raises(UserError) as error:
        make_backbone(tiny_model).add_role("dpo", str(tmp_path / "dpo"))
    assert str(other) in str(error.value) and str(tiny_model) in str(error.value)


def test_fingerprint_ignores_the_name_but_not_the_weights(tiny_model, tmp_path):
    same = write_tiny_model(tmp_path / "same")
    assert base_fingerprint(str(same)) == base_fingerprint(str(tiny_model))
    # A fine-tune that was merged into the projections and left the embeddings alone.
    model = AutoModelForCausalLM.from_pretrained(same)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(1.05)
            layer.mlp.down_proj.weight.mul_(1.05)
    model.save_pretrained(tmp_path / "merged")
    assert base_fingerprint(str(tmp_path / "merged")) != base_fingerprint(str(same))
    model = AutoModelForCausalLM.from_pretrained(same, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bfloat16")
    assert base_fingerprint(str(tmp_path / "bfloat16")) == base_fingerprint(str(same))


def test_role_of_another_vocabulary_is_refused(tiny_model, tmp_path):
    backbone = make_backbone(tiny_model)
    backbone.add_role("policy", trainable=True)
    backbone.save_role("policy", tmp_path / "dpo", backbone.card("policy", "dpo", {}))
    card = json.loads((tmp_path / "dpo" / "role.json").read_text())
    (tmp_path / "dpo" / "role.json").write_text(json.dumps({**card, "vocabulary_fingerprint": "0" * 16}))
    with pytest.raises(UserError, match="vocabulary differs"):
        make_backbone(tiny_model).add_role("dpo", str(tmp_path / "dpo"))


def test_missing_role_names_its_stage(tiny_model):
    with pytest.raises(MissingInputError, match=r"outputs/none/dpo/role does not exist") as error:
        make_backbone(tiny_model).add_role("dpo", "outputs/none/dpo/role")
    assert error.value.stage == "dpo"


def test_existing_folder_is_not_written_over(tiny_model, tmp_path):
    backbone = make_backbone(tiny_model)
    backbone.add_role("policy", trainable=True)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        backbone.save_role("policy", tmp_path, backbone.card("policy", "policy", {}))
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_contradicting_settings_are_refused(tiny_model):
    with pytest.raises(UserError, match="quantization does not go with mode full"):
        make_backbone(tiny_model, mode="full", quantization="nf4")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nowhere"])
def test_missing_model_is_one_sentence(name):
    with pytest.raises(UserError, match=f"{name} does not exist"):
        make_backbone(name)


def test_full_model_is_not_trained_in_adapter_mode(tiny_model, tmp_path):
    other = write_tiny_model(tmp_path / "other")
    with pytest.raises(UserError, match="is a full model"):
        make_backbone(tiny_model).add_role("policy", str(other), trainable=True)


def test_a_model_of_the_same_vocabulary_but_another_template_is_accepted(tiny_model, tmp_path):
    (tmp_path / "template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    backbone = make_backbone(tiny_model, chat_template=str(tmp_path / "template.jinja"))
    backbone.add_role("dpo", str(write_tiny_model(tmp_path / "other", seed=2)))
    assert "dpo" in backbone.roles


def test_a_prompt_without_tokens_is_refused(tiny_model):
    """The first token of its response would be read off the row before."""
    backbone = make_backbone(tiny_model)
    backbone.add_role("reference")
    with pytest.raises(ValueError, match="no tokens"):
        backbone.token_logprobs("reference", Sequences.from_lists([[1, 40], []], [[50, 2], [60, 2]], pad_id=2))
