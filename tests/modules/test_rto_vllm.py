"""RTO on what another engine samples: its log-probabilities are logged and weighed, never trained on."""

import importlib.util
import math

import pytest
import torch

from rto_lightning.modules.rto_settings import CriticSettings, PPOSettings
from rto_lightning.rollout import RolloutSettings, TransformersEngine, vllm
from rto_lightning.rollout.vllm import Sample
from tests.modules import stages


class SameModel:
    """An engine that samples as the transformers engine does, and says `offset` more of each token."""

    place = "here"
    max_model_len = 999
    offset = 0.0

    def __init__(self, backbone, settings):
        self.backbone, self.settings = backbone, settings
        self.adapters = []

    def start(self):
        return "here"

    def add_adapter(self, name, folder):
        self.adapters.append(name)

    def remove_adapter(self, name):
        self.adapters.remove(name)

    def sample(self, prompts, seeds, adapter):
        assert adapter is None or adapter in self.adapters
        role = "policy" if adapter is not None else "reference"
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        sampled = TransformersEngine(self.backbone, self.settings).rollout(role, ids, mask, seeds, with_logprobs=True)
        sequences, rows = sampled.sequences, range(len(prompts))
        responses = [sequences.response_ids[row][sequences.response_mask[row]].tolist() for row in rows]
        logprobs = [(sampled.logprobs[row][sequences.response_mask[row]] + self.offset).tolist() for row in rows]
        return [Sample(*row) for row in zip(responses, logprobs, strict=True)]

    def close(self):
        self.adapters = []


@pytest.fixture
def same_model(monkeypatch):
    monkeypatch.setattr(vllm, "ColocatedClient", SameModel)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name == "vllm" or find_spec(name, *rest))
    monkeypatch.setattr(SameModel, "offset", 0.1)


def _rto(model, engine="vllm", shared=False, **ppo):
    torch.manual_seed(0)  # adapters start at random
    return stages.rto(
        model,
        rollout=RolloutSettings(max_new_tokens=6, engine=engine),
        ppo=PPOSettings(microbatch_size=2, **ppo),
        critic=CriticSettings(init="policy", shared=shared),
    )


@pytest.mark.parametrize("shared", [False, True])
def test_the_run_is_that_of_the_same_samples(same_model, tiny_model, files, tmp_path, shared):
    """Policy, critic and weights come from the model that is trained, whatever the engine says of its samples."""
    module = _rto(tiny_model, shared=shared)
    metrics = stages.recorded_fit(module, files, tmp_path / "vllm")
    expected = _rto(tiny_model, "transformers", shared, sampling_logprobs=False)
    stages.recorded_fit(expected, files, tmp_path / "transformers")
    for name in ("policy", "critic"):
        pairs = zip(module.backbone.trained_parameters(name), expected.backbone.trained_parameters(name), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
    assert len(metrics) == 2
    for of_iteration in metrics:
        assert of_iteration["train/rollout/mismatch"] == pytest.approx(0.1, abs=1e-4)
        assert of_iteration["train/rollout/mismatch_kl"] == pytest.approx(math.expm1(-0.1) + 0.1, abs=1e-4)


def test_importance_weights_multiply_advantages(same_model, tiny_model, files):
    plain = stages.experience(_rto(tiny_model), files)
    weighed = stages.experience(_rto(tiny_model, importance_weight_cap=2.0), files)
    capped = stages.experience(_rto(tiny_model, importance_weight_cap=0.5), files)
    torch.testing.assert_close(weighed.advantages, plain.advantages * math.exp(-0.1), rtol=0, atol=1e-4)
    torch.testing.assert_close(capped.advantages, plain.advantages * 0.5)
    assert torch.equal(weighed.returns, plain.returns) and plain.advantages.abs().max() > 0.1


def test_nothing_of_it_is_logged_where_the_model_itself_samples(tiny_model, files):
    metrics = stages.experience(_rto(tiny_model, "transformers"), files).metrics()
    assert not [name for name in metrics if name.startswith("rollout/")]
