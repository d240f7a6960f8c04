"""Plans against the same work on real tensors."""

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch._subclasses.fake_tensor import is_fake
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, Qwen2Config, masking_utils

from rto_lightning.backbone import BackboneSettings, LoraSettings, PolicyBackbone, Sequences, load_chat_tokenizer
from rto_lightning.backbone.decoding import Draw, decode, evaluating
from rto_lightning.backbone.kv_cache import build_cache, cache_argument
from rto_lightning.memory.dry_run import Quantity, dry_run
from rto_lightning.memory.live_bytes import LiveBytes, tensor_bytes
from rto_lightning.memory.plan import plan_memory
from rto_lightning.memory.shapes import model_tensors
from rto_lightning.memory.workload import Forward, Phase, RoleWeights, Rollout, Workload
from rto_lightning.rollout.sampling import SeededSampling
from tests.tiny import tiny_tokenizer

ADAM = partial(torch.optim.AdamW, lr=1e-3)
LORA = LoraSettings(rank=4)
PROMPT, RESPONSE, ROWS = 24, 40, 3
SHAPE: dict[str, Any] = dict(
    vocab_size=320, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4
)
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SHAPE, num_key_value_heads=1, tie_word_embeddings=False),
    "neox": GPTNeoXConfig(**SHAPE),
    # Deep enough for two and three layers to stand for all, and with an embedding that is large beside those.
    "deep": LlamaConfig(
        **{**SHAPE, "vocab_size": 20000, "num_hidden_layers": 6}, num_key_value_heads=2, tie_word_embeddings=True
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("architectures")
    for name, config in CONFIGS.items():
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return {name: str(folder / name) for name in CONFIGS}


def backbone_of(settings: BackboneSettings) -> PolicyBackbone:
    """A real one with a policy that has a head, and the reference."""
    backbone = PolicyBackbone(settings, load_chat_tokenizer(settings))
    backbone.add_role("reference")
    backbone.add_role("policy", trainable=True, scalar_head=True)
    return backbone


def workload(settings: BackboneSettings, *parts: Any, **options: Any) -> Workload:
    """The same as shapes."""
    kind: Any = "adapter" if settings.mode == "adapters" else "model"
    policy = RoleWeights(
        "policy", kind, settings.lora, master=True, head=True, optimizer=options.pop("optimizer", ADAM)
    )
    roles = RoleWeights("reference", "base"), policy
    phases = (Phase("phase", parts, ("policy",)),)
    return Workload("sft", settings, roles, phases, PROMPT, RESPONSE, "", **options)


def sequences() -> Sequences:
    ids = torch.randint(3, 259, (ROWS, PROMPT + RESPONSE))
    return Sequences(ids, torch.ones_like(ids), torch.ones(ROWS, RESPONSE, dtype=torch.bool))


def work(backbone: PolicyBackbone, part: Forward) -> torch.Tensor:
    """What a stage would compute; a number to run the backward of."""
    rows, role = sequences(), part.role
    if part.reading == "values":
        return backbone.token_values(role, rows).sum()
    if part.reading == "score":
        return backbone.sequence_scores(role, rows).sum()
    if part.reading == "divergence":
        compared = backbone.token_divergence(role, "reference", rows)
        return (compared.logprobs + compared.kl).sum()
    logprobs, entropy = backbone.token_logprobs(role, rows, with_entropy="entropy" in part.reading)
    return logprobs.sum() if entropy is None else (logprobs + entropy).sum()


def weights_of(backbone: PolicyBackbone) -> list[torch.Tensor]:
    tensors = [tensor for module in (*backbone.models.values(), backbone.heads) for tensor in model_tensors(module)]
    return tensors + [weight.grad for weight in tensors if weight.grad is not None]


def measured(settings: BackboneSettings, part: Forward, context: Callable[[], Any] = nullcontext) -> int:
    """The most bytes alive at a time in the real work, beside weights and gradients."""
    backbone = backbone_of(settings)
    for weight in backbone.trained_parameters("policy"):
        weight.grad = torch.zeros_like(weight)
    known = weights_of(backbone)
    with LiveBytes(known) as live, torch.set_grad_enabled(part.backward), backbone.play(part.role), context():
        loss = work(backbone, part)
        if part.backward:
            loss.backward()
    return live.peak


SETTINGS: dict[str, dict[str, Any]] = {
    "adapters": {},
    "checkpointing": {"gradient_checkpointing": True},
    "full": {"mode": "full"},
    "full with checkpointing": {"mode": "full", "gradient_checkpointing": True, "logprob_chunk_tokens": 50},
    "bfloat16": {"dtype": "bfloat16"},
    "nf4 with checkpointing": {"quantization": "nf4", "dtype": "bfloat16", "gradient_checkpointing": True},
    "eager": {"attention": "eager"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_an_update_takes_what_is_planned(folders, name):
    settings = BackboneSettings(folders["llama"], lora=LORA, **SETTINGS[name])
    part = Forward("policy", "logprobs", ROWS, backward=True)
    planned = dry_run(workload(settings, part), None, False)[Quantity("activations", "policy", part)]
    assert planned == pytest.approx(measured(settings, part), rel=0.03)


@pytest.mark.parametrize("mode", ["adapters", "full"])
@pytest.mark.parametrize("architecture", ["qwen2", "neox"])
def test_other_architectures_take_what_is_planned(folders, architecture, mode):
    settings = BackboneSettings(folders[architecture], lora=LORA, mode=mode, gradient_checkpointing=mode == "full")
    part = Forward("policy", "logprobs", ROWS, backward=True)
    planned = dry_run(workload(settings, part), None, False)[Quantity("activations", "policy", part)]
    assert planned == pytest.approx(measured(settings, part), rel=0.03)


@pytest.mark.parametrize(
    ("reading", "backward"),
    [
        ("logprobs and entropy", False),
        ("logprobs and entropy", True),
        ("values", True),
        ("score", True),
        ("score", False),
        ("divergence", True),
    ],
)
def test_every_reading_takes_what_is_planned(folders, reading, backward):
    settings = BackboneSettings(folders["llama"], lora=LORA)
    part = Forward("policy", reading, ROWS, backward)
    planned = dry_run(workload(settings, part), None, False)[Quantity("activations", "policy", part)]
    assert planned == pytest.approx(measured(settings, part), rel=0.05)


def test_what_is_alive_after_a_forward_is_what_autograd_saves(folders):
    """An oracle that does not come from the counter: hooks on every tensor that autograd saves."""
    backbone = backbone_of(BackboneSettings(folders["llama"], lora=LORA))
    known = {tensor.untyped_storage().data_ptr() for tensor in weights_of(backbone)}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), LiveBytes(weights_of(backbone)) as live:
        loss = work(backbone, Forward("policy", "logprobs", ROWS))
        alive = live.now
    assert loss.requires_grad
    assert alive == pytest.approx(sum(storage.nbytes() for storage in saved.values()), rel=0.02)


@pytest.mark.parametrize("name", ["full", "bfloat16", "nf4 with checkpointing"])
def test_weights_and_gradients_are_counted_exactly(folders, name):
    settings = BackboneSettings(folders["llama"], lora=LORA, **SETTINGS[name])
    planned = dry_run(workload(settings, Forward("policy", "score", 1)), None, False)
    backbone = backbone_of(settings)
    trained = tensor_bytes(backbone.trained_parameters("policy"))
    adapters = {id(weight) for weight in backbone.adapters.parameters("policy")} if settings.mode == "adapters" else ()
    base = tensor_bytes(tensor for tensor in model_tensors(backbone.models["base"]) if id(tensor) not in adapters)
    assert planned[Quantity("weights", "policy")] == planned[Quantity("gradients", "policy")] == trained
    assert planned[Quantity("weights", "base")] == base


def adam_8bit(parameters: Any) -> torch.optim.Optimizer:
    return pytest.importorskip("bitsandbytes").optim.AdamW8bit(parameters, lr=1e-3, min_8bit_size=128)


@pytest.mark.parametrize(
    "make",
    [
        ADAM,
        partial(torch.optim.SGD, lr=0.1),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        adam_8bit,
        partial(torch.optim.Adagrad, lr=0.1),
        partial(torch.optim.Adafactor, lr=0.1),
    ],
    ids=["adamw", "sgd", "momentum", "adamw8bit", "adagrad", "adafactor"],
)
def test_optimizer_state_is_counted_exactly(folders, make):
    settings = BackboneSettings(folders["llama"], lora=LORA)
    planned = dry_run(workload(settings, Forward("policy", "score", 1), optimizer=make), None, False)
    parameters = backbone_of(settings).trained_parameters("policy")
    optimizer = make(parameters)
    for weight in parameters:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = [value for held in optimizer.state.values() for value in held.values() if isinstance(value, torch.Tensor)]
    assert planned[Quantity("optimizer", "policy")] == tensor_bytes(state)
    assert planned[Quantity("optimizer step", "policy")] == 0


def test_on_a_gpu_torch_copies_the_weights_to_step_them_at_once(folders):
    settings = BackboneSettings(folders["llama"], lora=LORA)
    part = Forward("policy", "score", 1)
    for make, copies in ((ADAM, 1), (partial(ADAM, foreach=False), 0), (partial(ADAM, fused=True), 0)):
        planned = dry_run(workload(settings, part, optimizer=make), None, foreach=True)
        assert planned[Quantity("optimizer step", "policy")] == copies * planned[Quantity("weights", "policy")]


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {}),
        ("llama", {"dtype": "bfloat16"}),
        ("llama", {"dtype": "bfloat16", "mode": "full"}),
        ("qwen2", {}),
        ("neox", {}),
    ],
)
def test_the_key_value_cache_is_counted_exactly(folders, architecture, options):
    settings = BackboneSettings(folders[architecture], lora=LORA, **options)
    part = Rollout("policy", ROWS, RESPONSE)
    planned = dry_run(workload(settings, part), None, False)
    backbone = backbone_of(settings)
    tokens = PROMPT + RESPONSE - 1
    with torch.no_grad(), backbone.play("policy") as model:
        cache = build_cache(model.config, tokens)
        ids = torch.ones(ROWS, tokens, dtype=torch.int64)
        model.eval()
        decoder = model.get_decoder()
        decoder(input_ids=ids, use_cache=True, **{cache_argument(decoder, cache): cache})
    held = [states for layer in cache.layers for states in (layer.keys, layer.values)]
    assert planned[Quantity("KV cache", "policy", part)] == tensor_bytes(held)


@pytest.mark.parametrize("group", [1, 3])
def test_a_rollout_takes_what_is_planned(folders, monkeypatch, group):
    """If no response ends early; with one row drawn at a time, so that the logits of all rows matter."""
    for module in ("rto_lightning.memory.dry_run", "rto_lightning.rollout.sampling"):
        monkeypatch.setattr(f"{module}.SAMPLED_LOGITS", 1)
    settings = BackboneSettings(folders["deep"], lora=LORA)
    rows = 6
    part = Rollout("policy", rows, RESPONSE, prompts=rows // group)
    planned = dry_run(workload(settings, part), None, False)
    cache, prefill, decoding = (planned[Quantity(kind, "policy", part)] for kind in ("KV cache", "prefill", "decoding"))
    backbone = backbone_of(settings)
    ids = torch.randint(3, 259, (rows // group, PROMPT)).repeat_interleave(group, dim=0)

    def most(token: int) -> int:
        sampling = SeededSampling(list(range(rows)), RESPONSE, 1.0)

        def draw(logits: torch.Tensor, rows: torch.Tensor, step: int) -> Draw:
            return Draw(torch.full_like(sampling(logits, rows, step).tokens, token))

        with LiveBytes(weights_of(backbone)) as live, backbone.play("policy") as model, evaluating(model):
            decode(model, ids, torch.ones_like(ids), draw, (2,), 2, RESPONSE)
        return live.peak

    all_end, none_ends = most(2), most(3)
    assert prefill == pytest.approx(all_end, rel=0.05)
    assert max(prefill, cache + decoding) == pytest.approx(none_ends, rel=0.05)


@pytest.mark.parametrize("backward", [False, True])
def test_mixed_precision_takes_what_is_planned(folders, backward):
    """In Lightning's context, which does not keep the 16-bit copy of a weight from one product to the next."""
    settings = BackboneSettings(folders["llama"], lora=LORA, **SETTINGS["full with checkpointing"])
    part = Forward("policy", "logprobs", ROWS, backward)
    planned = dry_run(workload(settings, part, precision="bf16-mixed"), None, False)
    real = measured(settings, part, MixedPrecision("bf16-mixed", "cpu").train_step_context)
    assert planned[Quantity("activations", "policy", part)] == pytest.approx(real, rel=0.03)


@pytest.mark.parametrize("name", ["adapters", "full"])
def test_a_deep_model_takes_what_is_planned(folders, name):
    settings = BackboneSettings(folders["deep"], lora=LORA, **SETTINGS[name])
    part = Forward("policy", "score", ROWS, backward=True)
    [phase] = plan_memory(workload(settings, part)).phases
    [activations] = [item.bytes for item in phase.items if item.name == "activations"]
    assert activations == pytest.approx(measured(settings, part), rel=0.03)


def test_a_frozen_deep_model_follows_from_two_and_three_layers(folders):
    settings = BackboneSettings(folders["deep"], lora=LORA, **SETTINGS["checkpointing"])
    parts = Forward("policy", "logprobs", ROWS, True), Rollout("policy", ROWS, RESPONSE)
    stage = workload(settings, *parts)
    stage = replace(stage, phases=(Phase("update", parts[:1], ("policy",)), Phase("rollout", parts[1:])))
    plan, exact = plan_memory(stage), dry_run(stage, None, False)
    assert {item.name: item.bytes for item in plan.weights} == {
        role: exact[Quantity("weights", role)] for role in ("base", "policy")
    }
    assert sum(item.bytes for item in plan.optimizers) == exact[Quantity("optimizer", "policy")]
    update, rollout = ({item.name: item.bytes for item in phase.items} for phase in plan.phases)
    assert update["gradients"] == exact[Quantity("gradients", "policy")]
    assert update["activations"] == exact[Quantity("activations", "policy", parts[0])]
    assert rollout["KV cache"] == exact[Quantity("KV cache", "policy", parts[1])]


def test_a_plan_leaves_no_trace(folders):
    """Neither in random numbers, from which adapters start, nor in transformers, nor in bitsandbytes' tables."""
    before, find = torch.get_rng_state(), masking_utils.find_packed_sequence_indices
    settings = BackboneSettings(folders["llama"], lora=LORA, quantization="nf4", dtype="bfloat16")
    parts = Forward("policy", "logprobs", ROWS, True), Rollout("policy", ROWS, RESPONSE)
    plan_memory(workload(settings, *parts, optimizer=adam_8bit))
    assert torch.equal(before, torch.get_rng_state())
    assert masking_utils.find_packed_sequence_indices is find
    tables = importlib.import_module("bitsandbytes.functional").name2qmap.values()
    assert not any(is_fake(table) for table in tables)
