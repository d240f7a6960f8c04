"""What five roles on one base compute, against plain transformers and PEFT, and what they hold in memory."""

import gc

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import linear, pad
from transformers import GenerationConfig

from rto_lightning.backbone import LoraSettings, Sequences
from rto_lightning.rollout import RolloutSettings, TransformersEngine
from tests.models import make_backbone, randomize, some_sequences, write_tiny_model
from tests.plain_peft import plain_logprobs, plain_model, plain_row_logprobs, rows_without_padding

BASES = {"float64": ("float64", False), "float32": ("float32", False), "nf4": ("float32", True)}
"""Data type of the base, and whether it is held in 4 bits."""
CLOSE = {"float64": 1e-12, "float32": 1e-6, "nf4": 1e-6}
"""How far a role may be from plain PEFT."""
SHAPES = {
    "policy": LoraSettings(rank=4, alpha=8),
    "critic": LoraSettings(rank=3, alpha=5, rank_stabilized=True),
    "dpo": LoraSettings(rank=2, alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]),
    "reward": LoraSettings(rank=8, alpha=4),
}
"""Adapters of unlike shape, so that none passes for another."""
TRAINED = ("policy", "critic")
HEADS = ("critic", "reward")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model whose log-probabilities are of a size that float32 gives to 1e-6."""
    folder = tmp_path_factory.mktemp("shared") / "model"
    return write_tiny_model(folder, initializer_range=0.05, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """A folder with a saved role of each name in SHAPES."""
    return _save_roles(model, tmp_path_factory.mktemp("roles"))


@pytest.fixture(scope="module", params=list(BASES))
def base(request, model, saved):
    """Name of a base, and a backbone with five roles on it."""
    return request.param, _five_roles(model, saved, request.param)


def _options(name):
    dtype, nf4 = BASES[name]
    return {"dtype": dtype, "quantization": "nf4" if nf4 else None}


def _save_roles(model, folder):
    for number, (role, shape) in enumerate(SHAPES.items()):
        alone = make_backbone(model, lora=shape)
        alone.add_role(role, trainable=True, scalar_head=role in HEADS)
        randomize(alone.trained_parameters(role), number, scale=0.05)
        alone.save_role(role, folder / role, alone.card(role, role, {}))
    return folder


def _five_roles(model, saved, name, **changes):
    backbone = make_backbone(model, **_options(name), **changes)
    backbone.add_role("reference")
    for role in SHAPES:
        backbone.add_role(role, str(saved / role), trainable=role in TRAINED, scalar_head=role in HEADS)
    return backbone


def _prompts(sequences):
    width = sequences.prompt_width
    return sequences.input_ids[:, :width], sequences.attention_mask[:, :width]


def _greedy(backbone, role, sequences, length):
    """Responses by this package's engine, (B, length), filled up with the stop id."""
    engine = TransformersEngine(backbone, RolloutSettings(max_new_tokens=length, temperature=0.0))
    answered = engine.rollout(role, *_prompts(sequences), [0] * len(sequences.input_ids)).sequences
    responses = answered.response_ids.masked_fill(~answered.response_mask, 2)
    return pad(responses, (0, length - responses.shape[1]), value=2)


@pytest.mark.parametrize("role", ["reference", "policy", "dpo", "critic", "reward"])
def test_logprobs_are_those_of_the_one_adapter_in_plain_peft(model, base, saved, role):
    name, backbone = base
    plain = plain_model(model, None if role == "reference" else saved / role, *BASES[name])
    with torch.no_grad():
        logprobs, _ = backbone.token_logprobs(role, some_sequences())
    torch.testing.assert_close(logprobs, plain_logprobs(plain, some_sequences()), rtol=0, atol=CLOSE[name])


@pytest.mark.parametrize("role", HEADS)
def test_scores_and_values_are_those_of_the_one_adapter_and_head(model, base, saved, role):
    name, backbone = base
    plain, head = plain_model(model, saved / role, *BASES[name]), load_file(saved / role / "head.safetensors")
    head = {key: weight.to(plain.dtype) for key, weight in head.items()}
    with torch.no_grad():
        scores = backbone.sequence_scores(role, some_sequences())
        values = backbone.token_values(role, some_sequences())
        assert scores.std() > 0
        for row, ids, length in rows_without_padding(some_sequences()):
            hidden = plain(ids, output_hidden_states=True).hidden_states[-1][0, -length - 1 :]
            expected = linear(hidden, head["weight"], head["bias"]).squeeze(-1)
            torch.testing.assert_close(scores[row], expected[-1], rtol=0, atol=CLOSE[name])
            torch.testing.assert_close(values[row, :length], expected[:-1], rtol=0, atol=CLOSE[name])


@pytest.mark.parametrize("role", ["reference", "policy", "dpo"])
def test_greedy_answers_are_those_of_the_one_adapter_in_plain_peft(model, base, saved, role):
    """Decoding goes a token at a time, through other kernels than a whole sequence does."""
    name, backbone = base
    plain = plain_model(model, None if role == "reference" else saved / role, *BASES[name])
    prompts, mask = _prompts(some_sequences())
    config = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=2)
    with torch.no_grad():
        expected = plain.generate(input_ids=prompts, attention_mask=mask, generation_config=config)
    found = _greedy(backbone, role, some_sequences(), 8)
    assert torch.equal(found, expected[:, prompts.shape[1] :])
    assert len(found.unique()) > 8


@pytest.mark.parametrize(("role", "checkpointing"), [("policy", True), ("critic", False)])
@pytest.mark.parametrize("name", list(BASES))
def test_gradients_are_those_of_the_one_adapter_in_plain_peft(model, saved, tmp_path, name, role, checkpointing):
    plain = plain_model(model, saved / role, *BASES[name])
    plain.requires_grad_(False)
    weights = {key.replace(".default.", "."): p for key, p in plain.named_parameters() if "lora_" in key}
    for weight in weights.values():
        weight.requires_grad_()
    for _, ids, length in rows_without_padding(some_sequences()):
        plain_row_logprobs(plain, ids, length).sum().backward()
    found = _gradients(_five_roles(model, saved, name, gradient_checkpointing=checkpointing), role, tmp_path)
    assert found.keys() == weights.keys()
    # Relative to the largest: sums in another order are off by the rounding of their terms.
    largest = max(float(weight.grad.abs().max()) for weight in weights.values())
    for key, weight in weights.items():
        torch.testing.assert_close(found[key] / largest, weight.grad / largest, rtol=0, atol=CLOSE[name])


def _gradients(backbone, role, folder):
    """Gradients of the summed log-probabilities under PEFT's names, after a rollout and a pass of another role."""
    _greedy(backbone, "policy", some_sequences(), 4)
    with torch.no_grad():
        backbone.token_logprobs("reference", some_sequences())
    with backbone.play(role):
        backbone.token_logprobs(role, some_sequences())[0].sum().backward()
    mine = {id(p) for p in backbone.adapters.parameters(role)}
    assert all((p.grad is not None) == (id(p) in mine) for p in backbone.parameters())
    with torch.no_grad():
        for parameter in backbone.adapters.parameters(role):
            parameter.copy_(parameter.grad)  # in the place of the weights, so that a saved role names them
    backbone.save_role(role, folder / "gradients", backbone.card(role, role, {}))
    return load_file(folder / "gradients" / "adapter_model.safetensors")


def test_a_bfloat16_base_is_as_exact_as_in_plain_peft(model, saved):
    """Adapters are float32 masters on it; added to 16-bit activations with less care, they would lose digits."""
    torch.manual_seed(0)
    lists = torch.randint(3, 259, (16, 40)).tolist()
    sequences = Sequences.from_lists([row[:8] for row in lists], [row[8:] for row in lists], pad_id=2)
    rounded = make_backbone(model, dtype="bfloat16")
    rounded.add_role("dpo", str(saved / "dpo"))
    exact = plain_model(model, saved / "dpo", "bfloat16").double()
    expected = plain_logprobs(exact, sequences)
    plain = plain_logprobs(plain_model(model, saved / "dpo", "bfloat16"), sequences)
    with torch.no_grad():
        found, _ = rounded.token_logprobs("dpo", sequences)
    errors = [(logprobs.double() - expected).abs().mean().item() for logprobs in (found, plain)]
    assert 0 < errors[0] < 1.2 * errors[1]


# Memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["float32", "nf4"])
def test_five_roles_hold_one_copy_of_the_base(tmp_path, name):
    """Counted over everything that is alive in the process, so that no hidden copy escapes."""
    model = write_tiny_model(tmp_path / "model", hidden_size=128, intermediate_size=256)
    saved = _save_roles(model, tmp_path)
    before = _live_bytes()
    alone = make_backbone(model, **_options(name))
    alone.add_role("reference")
    one = _live_bytes() - before
    del alone
    backbone = _five_roles(model, saved, name)
    assert list(backbone.models) == ["base"]
    backbone.train()
    _greedy(backbone, "policy", some_sequences(), 4)
    for role in TRAINED:
        with backbone.play(role):
            backbone.token_logprobs(role, some_sequences())[0].sum().backward()
    backbone.zero_grad()
    adapters = sum(weight.nbytes for role in SHAPES for weight in backbone.adapters.parameters(role))
    more = _live_bytes() - before - one - adapters
    sizes = {key: weight.numel() for key, weight in load_file(model / "model.safetensors").items()}
    quantized = sum(size for key, size in sizes.items() if "proj" in key) if name == "nf4" else 0
    # Half a byte, a share of the scale of 64 weights in a byte, and of the scale of 256 such scales in four bytes.
    of_weight = 1 / 2 + 1 / 64 + 4 / (64 * 256)
    assert one == pytest.approx(quantized * of_weight + (sum(sizes.values()) - quantized) * 4, rel=0.1)
    assert 0 <= more < one / 20


def _live_bytes():
    """Bytes of every storage that some tensor of this process keeps alive."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
