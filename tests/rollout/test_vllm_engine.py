"""What the vLLM engine does around its client: weights handed over, trajectories, crashes. The client is made up."""

import importlib.util
import os
import tempfile

import pytest
import torch
from safetensors.torch import load_file

from rto_lightning.errors import UserError
from rto_lightning.rollout import RolloutSettings, VLLMSettings, build_engine
from rto_lightning.rollout.vllm import EngineStopped, Sample, VLLMEngine, transfer
from rto_lightning.rollout.vllm.client import engine_arguments
from rto_lightning.rollout.vllm.colocated import engine_environment, last_words
from tests.models import make_backbone, randomize, some_sequences, write_tiny_model

STOP = 2
LIMIT = 4


class FakeClient:
    """Answers with the same tokens always, and remembers what it was told."""

    place = "here"
    max_model_len = 16

    def __init__(self, backbone, settings):
        self.told = []
        self.weights = {}
        self.crashes = []  # name of a method that ends the engine, or None, for each start
        self.answers = [[70, STOP], [80, 81, 82, 83], [90, 91, STOP]]

    def start(self):
        self.told.append("start")
        self.dying = self.crashes.pop(0) if self.crashes else None
        return "address"

    def connect(self, address):
        raise AssertionError("one rank leads")

    def add_adapter(self, name, folder):
        self._tell("add_adapter", name)
        self.weights[name] = load_file(folder / "adapter_model.safetensors")

    def remove_adapter(self, name):
        self._tell("remove_adapter", name)
        del self.weights[name]

    def load_weights(self, folder):
        self._tell("load_weights")
        self.weights["model"] = load_file(folder / "model.safetensors")
        self.folder = folder

    def sample(self, prompts, seeds, adapter):
        self._tell("sample", adapter)
        self.prompts, self.seeds = prompts, seeds
        return [Sample(tokens, [-float(token) for token in tokens]) for tokens in self.answers]

    def close(self):
        self.told.append("close")
        self.weights = {}

    def names(self):
        """What was told, without the part of adapters' names that differs between runs."""
        return [
            (name, f"adapter {rest[0].split('-')[-1]}" if rest and rest[0] else None)
            for name, *rest in (call if isinstance(call, tuple) else (call,) for call in self.told)
        ]

    def _tell(self, name, *arguments):
        self.told.append((name, *arguments))
        if self.dying == name:
            raise EngineStopped(f"{name} ran out of memory")


def _backbone(tiny_model, **changes):
    backbone = make_backbone(tiny_model, dtype="float32", **changes)
    backbone.add_role("reference")
    backbone.add_role("policy", trainable=True)
    return backbone


@pytest.fixture
def engine(tiny_model, tmp_path):
    settings = RolloutSettings(LIMIT, engine="vllm", vllm=VLLMSettings(transfer_folder=str(tmp_path / "transfer")))
    engine = VLLMEngine(_backbone(tiny_model), settings, FakeClient)
    yield engine
    engine.close()


def _rollout(engine, role="policy"):
    sequences = some_sequences()
    width = sequences.prompt_width
    return engine.rollout(role, sequences.input_ids[:, :width], sequences.attention_mask[:, :width], [7, 8, 9])


def _change(engine, role="policy"):
    randomize(engine.backbone.trained_parameters(role))


def test_a_trajectory_from_what_the_engine_sampled(engine):
    trajectory = _rollout(engine)
    assert engine.client.prompts == [[1, 40, 41, 42, 43, 44], [1, 50, 51], [1, 60]]
    assert engine.client.seeds == [7, 8, 9]
    sequences = trajectory.sequences
    assert [ids[mask].tolist() for ids, mask in zip(sequences.response_ids, sequences.response_mask, strict=True)] == (
        engine.client.answers
    )
    assert torch.equal(sequences.input_ids[:, :6], some_sequences().input_ids[:, :6])
    assert trajectory.truncated.tolist() == [False, True, False] and trajectory.role == "policy"
    assert trajectory.engine_logprobs.tolist() == [[-70, -2, 0, 0], [-80, -81, -82, -83], [-90, -91, -2, 0]]
    assert trajectory.logprobs is trajectory.entropies is trajectory.values is None
    assert trajectory.rows(slice(1, 2)).engine_logprobs.tolist() == [[-80, -81, -82, -83]]


def test_an_adapter_is_handed_over_when_it_has_changed(engine, tmp_path):
    _rollout(engine)
    _rollout(engine)
    _change(engine)
    _rollout(engine)
    assert engine.client.names() == [
        ("start", None),
        ("add_adapter", "adapter 1"),
        ("sample", "adapter 1"),
        ("sample", "adapter 1"),
        ("remove_adapter", "adapter 1"),
        ("add_adapter", "adapter 2"),
        ("sample", "adapter 2"),
    ]
    (weights,) = engine.client.weights.values()
    policy = engine.backbone.trained_parameters("policy")
    assert sorted(w.double().sum().item() for w in weights.values()) == pytest.approx(
        sorted(p.double().sum().item() for p in policy)
    )
    folders = list((tmp_path / "transfer").glob("*/*"))
    assert [folder.name for folder in folders] == ["policy-2"]
    engine.close()
    assert not list((tmp_path / "transfer").iterdir())


def test_a_role_without_an_adapter_samples_as_the_base(engine):
    _rollout(engine, "reference")
    assert engine.client.names() == [("start", None), ("sample", None)]


def test_every_weight_is_handed_over_where_every_weight_is_trained(tmp_path):
    model = write_tiny_model(tmp_path / "model", tie_word_embeddings=False)
    vllm = VLLMSettings(dtype="bfloat16", transfer_folder=str(tmp_path / "transfer"))
    engine = VLLMEngine(_backbone(model, mode="full"), RolloutSettings(LIMIT, vllm=vllm), FakeClient)
    _rollout(engine, "reference")
    _rollout(engine)
    _rollout(engine)
    _change(engine)
    _rollout(engine)
    policy = {name: weight.bfloat16() for name, weight in engine.backbone.models["policy"].named_parameters()}
    handed_over = engine.client.weights["model"]
    assert handed_over.keys() == policy.keys()
    assert all(torch.equal(handed_over[name], weight) for name, weight in policy.items())
    _rollout(engine, "reference")
    base = engine.backbone.models["base"].get_input_embeddings().weight
    assert torch.equal(engine.client.weights["model"]["model.embed_tokens.weight"], base.bfloat16())
    assert [name for name, _ in engine.client.names()] == [
        *("start", "sample"),
        *("load_weights", "sample", "sample"),
        *("load_weights", "sample"),
        *("load_weights", "sample"),
    ]
    assert not engine.client.folder.exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_weights_are_written_once_and_adapters_not_at_all(tiny_model, tmp_path, dtype):
    backbone = _backbone(tiny_model)
    randomize(backbone.trained_parameters("policy"))
    transfer.write_model(backbone.models["base"], tmp_path, dtype)
    written = load_file(tmp_path / "model.safetensors")
    expected = load_file(tiny_model / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name].to(dtype)) for name, weight in written.items())


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is vLLM on a CPU that cannot")
def test_a_tied_output_layer_is_refused_where_it_would_stay_as_it_was(tiny_model):
    engine = VLLMEngine(_backbone(tiny_model, mode="full"), RolloutSettings(LIMIT), FakeClient)
    _rollout(engine, "reference")
    with pytest.raises(UserError, match="does not take new weights for a model whose output layer is its embedding"):
        _rollout(engine)
    engine.close()


@pytest.mark.parametrize("change", ["sign", "one"])
def test_a_step_of_the_optimizer_is_seen(change):
    weights = [torch.zeros(3, 4), torch.ones(5), torch.empty(0)]
    before = transfer.weights_digest(weights)
    assert transfer.weights_digest(weights) == before
    if change == "sign":  # leaves the sum as it is
        weights[0] += 1e-4 * torch.tensor([1.0, -1.0]).repeat(6).view(3, 4)
    else:
        weights[1][2] += 1e-6
    assert transfer.weights_digest(weights) != before


@pytest.mark.parametrize("where", ["sample", "add_adapter"])
def test_a_crash_is_reported_and_survived(engine, where):
    engine.client.crashes = [where]
    with pytest.warns(match=f"vLLM stopped, and said last: {where} ran out of memory. It is started again"):
        trajectory = _rollout(engine)
    assert trajectory.truncated.tolist() == [False, True, False]
    calls = [name for name, _ in engine.client.names()]
    crashed = ["start", "add_adapter", "sample"][: 2 if where == "add_adapter" else 3]
    assert calls == [*crashed, "close", "start", "add_adapter", "sample"]
    assert len(engine.client.weights) == 1


def test_a_second_crash_ends_the_run(engine):
    engine.client.crashes = ["sample", None]
    with pytest.warns(match="started again"):
        _rollout(engine)
    engine.client.dying = "sample"
    with pytest.raises(UserError, match="vLLM stopped a second time in this run, and said last: sample ran out of mem"):
        _rollout(engine)


def test_a_response_that_was_broken_off_is_a_crash(engine):
    engine.client.answers = [[70], [80, STOP], [STOP]]
    with (
        pytest.warns(match="a response of 1 tokens, which it broke off"),
        pytest.raises(UserError, match="stopped a second time"),
    ):
        _rollout(engine)


def test_what_does_not_fit_is_told_before_it_is_sampled(engine):
    engine.client.max_model_len = 6 + LIMIT - 1
    with pytest.raises(UserError, match=r"a prompt of 6 tokens and rollout.max_new_tokens 4 do not fit the 9 tokens"):
        _rollout(engine)
    assert engine.client.names() == [("start", None)]


def test_the_same_weights_and_arithmetic_in_both_engines(engine):
    settings = RolloutSettings(LIMIT, batch_size=3, vllm=VLLMSettings(enforce_eager=True))
    arguments = engine_arguments(engine.backbone, settings)
    assert arguments == {
        "dtype": "float32",
        "trust_remote_code": False,
        "tensor_parallel_size": 1,
        "gpu_memory_utilization": 0.3,
        "max_model_len": -1,
        "max_num_seqs": 3,
        "enforce_eager": True,
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": 8,
    }


def test_what_the_settings_of_vllm_change(tiny_model):
    backbone = _backbone(tiny_model, mode="full")
    vllm = VLLMSettings("server", max_model_len=99, engine_options={"dtype": "float16", "seed": 3, "revision": None})
    arguments = engine_arguments(backbone, RolloutSettings(LIMIT, vllm=vllm))
    assert arguments["dtype"] == "float16" and arguments["seed"] == 3 and arguments["max_model_len"] == 99
    assert arguments["gpu_memory_utilization"] == 0.9
    assert "enable_lora" not in arguments and "max_num_seqs" not in arguments


def test_an_engine_knows_nothing_of_the_launcher(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    with engine_environment(device=1):
        assert "RANK" not in os.environ and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"
        os.environ["LD_PRELOAD"] = "something of vLLM's"
    assert os.environ["RANK"] == "1" and os.environ["CUDA_VISIBLE_DEVICES"] == "2,5"
    assert "LD_PRELOAD" not in os.environ


def test_last_words():
    assert last_words("a\nValueError: x\nKeyError: 'x'\nbecause.\n") == "KeyError: 'x' because"
    assert last_words("a\n\nb.\n") == "b"
    assert last_words("") == "nothing"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VLLMSettings(port=8000), "vllm.port is for mode server, and mode is colocated"),
        (lambda: VLLMSettings(urls=["http://a:1"]), "vllm.urls is for mode server"),
        (lambda: VLLMSettings(tensor_parallel_size=2), "tensor_parallel_size 2 needs several devices"),
        (lambda: VLLMSettings("server", urls=["http://a:1"], port=1), "servers that run already; set port"),
        (lambda: VLLMSettings(gpu_memory_utilization=1.5), "gpu_memory_utilization is 1.5; set it to 1 or less"),
        (lambda: VLLMSettings(max_model_len=0), "max_model_len is 0; set it above 0"),
        (lambda: RolloutSettings(4, engine="vllm").check(0, True, None), "sampling_logprobs does not go with rollout"),
        (lambda: RolloutSettings(4).check(0, None, 2.0), "importance_weight_cap corrects what rollout.engine vllm"),
        (lambda: RolloutSettings(4).check(5, None, None), "min_response_tokens 5 is above rollout.max_new_tokens 4"),
        (lambda: RolloutSettings(4, temperature=0.0).check_engine(training=True), "gives PPO nothing to learn from"),
    ],
)
def test_settings_that_contradict_each_other(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_vllm_must_be_there_unless_a_server_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"rollout\.engine vllm needs the package vllm; run `pip install"):
        RolloutSettings(4, engine="vllm").check_engine(training=False)
    RolloutSettings(4).check_engine(training=False)
    elsewhere = VLLMSettings("server", urls=["http://node7:8000"])
    RolloutSettings(4, engine="vllm", vllm=elsewhere).check_engine(training=False)


def test_nothing_is_started_before_the_first_rollout(tiny_model):
    engine = build_engine(_backbone(tiny_model), RolloutSettings(LIMIT, engine="vllm"))
    assert isinstance(engine, VLLMEngine)
    engine.close()


def test_a_quantized_base_is_warned_of(tiny_model):
    backbone = make_backbone(tiny_model, dtype="float32", quantization="nf4")
    with pytest.warns(match="vLLM samples from the base as it is stored, and training reads it in nf4"):
        build_engine(backbone, RolloutSettings(LIMIT, engine="vllm"))


def test_folders_of_weights_are_in_memory_if_there_is_such_a_place(monkeypatch, tmp_path):
    monkeypatch.setattr(transfer, "SHARED_MEMORY", tmp_path)
    assert transfer.transfer_folder(None).parent == tmp_path
    monkeypatch.setattr(transfer, "SHARED_MEMORY", tmp_path / "absent")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert transfer.transfer_folder(None).parent == tmp_path
    assert transfer.transfer_folder(str(tmp_path / "new")).parent == tmp_path / "new"
