"""The weights that a loaded backbone holds, against what the plan of the same stage says."""

import pytest
import torch

from rto_lightning.data import PromptDataModule
from rto_lightning.memory import plan_memory, weight_bytes, weight_tensors, workload_of
from rto_lightning.modules.rto_settings import CriticSettings, RewardSettings
from tests.models import make_backbone
from tests.modules import stages
from tests.roles import save_random_role


@pytest.mark.parametrize("changes", [{"quantization": "nf4"}, {"mode": "full"}], ids=["nf4", "full"])
def test_they_are_what_the_plan_says(tiny_model, tmp_path, changes):
    roles = {name: save_random_role(tiny_model, tmp_path / name, name, **changes) for name in ("dpo", "reward")}
    module = stages.rto(
        tiny_model,
        backbone=changes,
        reward_function=None,
        rewards=RewardSettings(beta_1=0.1),
        critic=CriticSettings(init="reward"),
        **roles,
    )
    data = PromptDataModule(train="x", max_prompt_tokens=8, batch_size=4)
    planned = {item.name: item.bytes for item in plan_memory(workload_of(module, data)).weights}
    module.configure_model()
    assert weight_bytes(module.backbone) == planned


def test_a_shared_critic_has_a_head_only_and_the_reference_nothing(tiny_model):
    backbone = make_backbone(tiny_model)
    backbone.add_role("reference")
    backbone.add_role("policy", trainable=True)
    backbone.share_role("policy", "critic")
    tensors = weight_tensors(backbone)
    assert list(tensors) == ["base", "policy", "critic"]
    assert {id(weight) for weight in tensors["critic"]} == set(map(id, backbone.head("critic").parameters()))
    assert {id(weight) for weight in tensors["policy"]} == set(map(id, backbone.trained_parameters("policy")))
    before = [tensor.clone() for tensor in tensors["base"]]
    with torch.no_grad():
        tensors["policy"][0].add_(1.0)
    assert all(torch.equal(old, new) for old, new in zip(before, tensors["base"], strict=True))
