"""Rollouts by vLLM itself, on a CPU: the tokens of the transformers engine, weights handed over, crashes, a run.

Skipped without the package; `.ci/vllm` makes an environment that has it.
"""

import csv
import importlib.util
import json
import multiprocessing
import os
import signal

import pytest
import torch
import yaml

from rto_lightning.backbone import Sequences
from rto_lightning.cli import main
from rto_lightning.errors import UserError
from rto_lightning.rollout import RolloutSettings, TransformersEngine, VLLMSettings, build_engine
from tests.models import make_backbone, randomize, write_tiny_model

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]

PROMPTS = [[1, 40, 41, 42, 43, 44], [1, 50, 51], [1, 50, 51], [1, 60], list(range(3, 60))]
OPTIONS = {"kv_cache_memory_bytes": 2**27}
TOLERANCE = 1e-4
"""Nats between two float32 forwards that add in another order, at logits of up to 50; in bfloat16 it is about 0.04."""


@pytest.fixture(scope="module", autouse=True)
def small():
    """One thread, and no more memory than the tests need."""
    patch = pytest.MonkeyPatch()
    patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    patch.setenv("OMP_NUM_THREADS", "1")
    yield
    patch.undo()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Heads of 64, a size that vLLM's kernels have."""
    shape = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", tie_word_embeddings=False, **shape)


def _backbone(model, mode):
    backbone = make_backbone(model, mode=mode, dtype="float32")
    backbone.chat.stop_ids = tuple(range(2, 259, 20))  # the tiny model seldom samples its own
    backbone.add_role("reference")
    backbone.add_role("policy", trainable=True)
    randomize(backbone.trained_parameters("policy"))
    return backbone


def _settings(where, temperature=0.0, **engine_options):
    options = {**OPTIONS, **engine_options}
    vllm_settings = VLLMSettings(where, max_model_len=128, enforce_eager=True, engine_options=options)
    return RolloutSettings(20, temperature, engine="vllm", vllm=vllm_settings)


def _rollout(engine, role, seeds=(0, 1, 2, 3, 4)):
    sequences = Sequences.from_lists(PROMPTS, [[2]] * len(PROMPTS), pad_id=2)
    width = sequences.prompt_width
    return engine.rollout(role, sequences.input_ids[:, :width], sequences.attention_mask[:, :width], list(seeds))


def _responses(trajectory):
    sequences = trajectory.sequences
    rows = zip(sequences.response_ids, sequences.response_mask, strict=True)
    return [ids[mask].tolist() for ids, mask in rows]


def _check_greedy(engine, role):
    """The tokens of the transformers engine, and log-probabilities of the model that is trained."""
    trajectory = _rollout(engine, role)
    expected = _rollout(TransformersEngine(engine.backbone, engine.settings), role)
    assert _responses(trajectory) == _responses(expected)
    assert torch.equal(trajectory.truncated, expected.truncated)
    _check_logprobs(engine, role, trajectory)
    return _responses(trajectory)


def _check_logprobs(engine, role, trajectory):
    with torch.no_grad():
        logprobs, _ = engine.backbone.token_logprobs(role, trajectory.sequences, engine.settings.temperature or 1.0)
    torch.testing.assert_close(trajectory.engine_logprobs, logprobs, rtol=0, atol=TOLERANCE)


def _kill(engine):
    """What the kernel does to a process when memory runs out."""
    process = getattr(engine.client, "_process", None)
    if process is not None:
        os.killpg(process.process.pid, signal.SIGKILL)
        process.process.wait()
        return
    for child in multiprocessing.active_children():
        child.kill()
        child.join()


@pytest.mark.parametrize("where", ["colocated", "server"])
@pytest.mark.parametrize("mode", ["adapters", "full"])
def test_greedy_tokens_are_those_of_the_transformers_engine(model, mode, where):
    """Of the base, of the policy, of the changed policy; and in mode adapters after crashes too."""
    engine = build_engine(_backbone(model, mode), _settings(where))
    try:
        base, policy = _check_greedy(engine, "reference"), _check_greedy(engine, "policy")
        assert base != policy and len({len(response) for response in policy}) > 1
        randomize(engine.backbone.trained_parameters("policy"), seed=1)
        changed = _check_greedy(engine, "policy")
        assert changed != policy
        assert _check_greedy(engine, "reference") == base
        assert _check_greedy(engine, "policy") == changed
        if mode == "adapters":
            engine.backbone.copy_role("policy", "policy_average", trainable=True)
            randomize(engine.backbone.trained_parameters("policy_average"), seed=2)
            assert _check_greedy(engine, "policy_average") != changed
            assert _check_greedy(engine, "policy") == changed
            _check_crashes(engine)
    finally:
        engine.close()


def _check_crashes(engine):
    """The first is survived, and the same tokens sampled; the second ends the run."""
    _kill(engine)
    with pytest.warns(match="vLLM stopped, and said last: .* It is started again"):
        _check_greedy(engine, "policy")
    _kill(engine)
    with pytest.raises(UserError, match="vLLM stopped a second time in this run"):
        _rollout(engine, "policy")


@pytest.mark.parametrize("where", ["colocated", "server"])
def test_samples_depend_on_prompt_and_seed_and_are_read_at_their_temperature(model, where):
    engine = build_engine(_backbone(model, "adapters"), _settings(where, temperature=0.7))
    try:
        trajectory = _rollout(engine, "policy")
        _check_logprobs(engine, "policy", trajectory)
        responses = _responses(trajectory)
        assert responses[1] != responses[2]
        assert _responses(_rollout(engine, "policy")) == responses
        assert _responses(_rollout(engine, "policy", seeds=[9, 2, 2, 9, 9]))[1:3] == [responses[2], responses[2]]
    finally:
        engine.close()


def test_a_model_that_vllm_refuses_is_told_of(tmp_path):
    odd = write_tiny_model(tmp_path / "odd")
    engine = build_engine(_backbone(odd, "adapters"), _settings("server", quantization="no_such_method"))
    with pytest.raises(UserError, match=r"vLLM did not start: .*no_such_method"):
        _rollout(engine, "policy")
    engine.close()


@pytest.mark.parametrize("where", ["colocated", "server"])
def test_a_run_of_rto(model, tmp_path, where, monkeypatch):
    """The command itself: three iterations whose samples come from vLLM."""
    monkeypatch.chdir(tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Question {n}?"}) + "\n" for n in range(12)))
    config = {
        "model": {
            "class_path": "RTOModule",
            "init_args": {
                "backbone": {"model": str(model), "lora": {"rank": 4}},
                "reward_function": "tests.modules.stages:count_exclamations",
                "rewards": {"beta_1": 0.0, "normalization_samples": 4},
                "ppo": {"microbatch_size": 2, "importance_weight_cap": 2.0},
                "critic": {"init": "policy"},
                "policy_optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}},
                "rollout": {
                    "max_new_tokens": 12,
                    "vllm": {"mode": where, "max_model_len": 128, "enforce_eager": True, "engine_options": OPTIONS},
                },
            },
        },
        "data": {
            "class_path": "PromptDataModule",
            "init_args": {"train": str(prompts), "max_prompt_tokens": 60, "batch_size": 4},
        },
        "trainer": {"max_steps": 3, "accelerator": "cpu", "default_root_dir": "out", "log_every_n_steps": 1},
    }
    (tmp_path / "rto.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "rto.yaml", "--model.rollout.engine=vllm"]) == 0
    with open("out/metrics/fit/metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/kl")]
    assert len(rows) == 3
    for row in rows:
        assert 0 <= float(row["train/rollout/mismatch"]) < TOLERANCE
        assert 0 <= float(row["train/rollout/mismatch_kl"]) < TOLERANCE
    assert abs(float(rows[0]["train/kl"])) < 1e-3 < abs(float(rows[2]["train/kl"]))
