"""The roles of a plan against those that the modules really build."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from rto_lightning.data import DemonstrationDataModule, PreferenceDataModule, PromptDataModule
from rto_lightning.memory.dry_run import Quantity, dry_run
from rto_lightning.memory.live_bytes import tensor_bytes
from rto_lightning.memory.plan import plan_memory
from rto_lightning.memory.shapes import model_tensors
from rto_lightning.memory.stages import workload_of
from rto_lightning.modules import StageModule
from rto_lightning.modules.rto_settings import CriticSettings, PPOSettings, RewardSettings
from rto_lightning.rewards import WeightedReward
from rto_lightning.rollout import RolloutSettings
from tests.models import write_tiny_classifier
from tests.modules import stages
from tests.roles import save_random_role

LIMITS: dict[str, Any] = {"max_prompt_tokens": 20, "batch_size": 4}
PREFERENCES = PreferenceDataModule(train="x", validation="x", max_response_tokens=8, **LIMITS)
PROMPTS = PromptDataModule(train="x", **LIMITS)


@pytest.fixture(scope="module")
def saved(tiny_model, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("saved")
    made = {
        f"{mode} {role}": save_random_role(tiny_model, folder / f"{mode}-{role}", role, mode=mode)
        for mode in ("adapters", "full")
        for role in ("policy", "dpo", "reward")
    }
    return {**made, "classifier": str(write_tiny_classifier(folder / "classifier"))}


def check_weights(module: StageModule, data: Any, with_phases: bool = True) -> None:
    """Names and bytes of every role and of the base, planned and real; what is computed in phases can be left out."""
    workload = workload_of(module, data)
    planned = dry_run(workload if with_phases else replace(workload, phases=()), None, False)
    module.configure_model()
    backbone = module.backbone
    real: dict[str, int] = {}
    for name, role in backbone.roles.items():
        head = list(backbone.heads[name].parameters()) if name in backbone.heads else []
        body: list[torch.Tensor] = []
        if role.body_of is None and role.adapter is not None:
            body = backbone.adapters.parameters(role.adapter)
        elif role.body_of is None and role.model != "base":
            body = list(backbone.models[role.model].parameters())
        real[name] = tensor_bytes([*body, *head])
    if "base" in backbone.models:
        adapters = {id(weight) for name in backbone.adapters.names for weight in backbone.adapters.parameters(name)}
        tensors = model_tensors(backbone.models["base"])
        real["base"] = tensor_bytes(tensor for tensor in tensors if id(tensor) not in adapters)
    weights = {key.role: size for key, size in planned.items() if key.kind == "weights"}
    outside = [name for name in weights if "/" in name]
    for name in outside:
        of_sources = [source.model for source in module.scores.sources if hasattr(source, "model")]  # type: ignore[union-attr]
        assert weights.pop(name) == sum(tensor_bytes(model.parameters()) for model in of_sources)
    if "base" not in real:
        assert weights.pop("base") == 0
    assert weights == real
    trained = {name for name in real if name != "base" and backbone.trained_parameters(name)}
    trained.discard("policy_average")  # its weights change without gradients
    assert {key.role for key in planned if key.kind == "gradients"} == trained


@pytest.mark.parametrize(("loss", "mode"), [("dpo", "adapters"), ("dpo", "full"), ("simpo", "full")])
def test_a_preference_stage_holds_what_is_planned(tiny_model, mode, loss):
    check_weights(stages.dpo(tiny_model, loss=loss, mode=mode), PREFERENCES)


def test_an_sft_adapter_is_held_twice(tiny_model, saved):
    check_weights(stages.dpo(tiny_model, init=saved["adapters policy"]), PREFERENCES)


@pytest.mark.parametrize("mode", ["adapters", "full"])
def test_sft_and_reward_model_hold_what_is_planned(tiny_model, mode):
    check_weights(stages.sft(tiny_model, mode=mode), DemonstrationDataModule(train="x", **LIMITS))
    check_weights(stages.reward_model(tiny_model, mode=mode), PREFERENCES)


RTO: dict[str, dict[str, Any]] = {
    "paper": {},
    "average": {"ema_decay": 0.9},
    "critic from the policy": {"critic": CriticSettings(init="policy")},
    "shared critic": {"critic": CriticSettings(shared=True)},
    "no critic, no dpo": {
        "ppo": PPOSettings(estimator="reinforce++", microbatch_size=2),
        "dpo": None,
        "rewards": RewardSettings(beta_1=0.0),
    },
    "no score": {"reward": None, "rewards": RewardSettings(beta_3=0.0), "critic": CriticSettings(init="policy")},
}


@pytest.mark.parametrize(
    ("name", "mode"), [*((name, "adapters") for name in RTO), ("paper", "full"), ("average", "full")]
)
def test_rto_holds_what_is_planned(tiny_model, saved, name, mode):
    options = {"dpo": saved[f"{mode} dpo"], "reward": saved[f"{mode} reward"], **RTO[name]}
    roles = {(mode, role): saved[f"{mode} {role}"] for role in ("dpo", "reward")}
    check_weights(stages.full_rto(tiny_model, roles, mode, **options), PROMPTS, with_phases=name == "paper")


def test_rto_with_roles_of_every_kind_holds_what_is_planned(tiny_model, saved):
    """An SFT start, another reference of DPO, full models beside adapters, and an outside reward model."""
    module = stages.rto(
        tiny_model,
        backbone={"init": saved["adapters policy"]},
        dpo=saved["full dpo"],
        dpo_reference=saved["adapters policy"],
        reward=saved["full reward"],
        reward_function=None,
        more_rewards=[WeightedReward(reward=saved["classifier"]), WeightedReward(reward=saved["adapters reward"])],
        rewards=RewardSettings(),
        critic=CriticSettings(),
    )
    check_weights(module, PROMPTS)


def test_phases_of_rto_follow_its_batch_sizes(tiny_model, saved):
    roles = {("adapters", role): saved[f"adapters {role}"] for role in ("dpo", "reward")}
    ppo = PPOSettings(minibatch_size=6, microbatch_size=3)
    rollout = RolloutSettings(max_new_tokens=9, responses_per_prompt=3, batch_size=5)
    workload = workload_of(stages.full_rto(tiny_model, roles, ppo=ppo, rollout=rollout), PROMPTS, "bf16-mixed")
    parts = {phase.name: [(part.role, part.rows) for part in phase.parts] for phase in workload.phases}
    assert parts == {
        "rollout": [("policy", 5)],
        "scoring": [("policy", 6)],  # of all roles on the base the one that takes the most
        "update of policy": [("policy", 3)],
        "update of critic": [("critic", 3)],
    }
    assert (workload.samples, workload.prompt_tokens, workload.response_tokens) == (12, 20, 9)
    assert workload.phases[0].parts[0].prompts == 3  # five neighbours hold answers to three prompts at most
    assert {phase.name: phase.trains for phase in workload.phases}["update of critic"] == ("critic",)


@pytest.mark.parametrize(
    ("batch_size", "eval_batch_size", "rows_and_prompts"),
    [(None, 8, [(12, 4), (8, None)]), (6, 8, [(6, 2), (6, None)]), (None, 4, [(12, 4)]), (1, 8, [(1, 1)])],
)
def test_validation_shares_no_prompts(tiny_model, batch_size, eval_batch_size, rows_and_prompts):
    rollout = RolloutSettings(max_new_tokens=9, responses_per_prompt=3, batch_size=batch_size)
    data = PromptDataModule(train="x", validation="x", eval_batch_size=eval_batch_size, **LIMITS)
    parts = workload_of(stages.rto(tiny_model, rollout=rollout), data).phases[0].parts
    assert [(part.rows, part.prompts) for part in parts] == rows_and_prompts


def test_a_shared_critic_is_updated_with_the_policy(tiny_model, saved):
    roles = {("adapters", role): saved[f"adapters {role}"] for role in ("dpo", "reward")}
    workload = workload_of(stages.full_rto(tiny_model, roles, critic=CriticSettings(shared=True)), PROMPTS)
    *_, update = workload.phases
    assert update.name == "update of policy and critic" and update.trains == ("policy", "critic")
    planned = dry_run(workload, None, False)
    assert planned[Quantity("weights", "critic")] == (32 + 1) * 4
    assert planned[Quantity("activations", "policy", update.parts[0])] > 0


def test_a_reference_cache_leaves_the_copy_of_full_training_out(tiny_model):
    cached = partial(stages.dpo, tiny_model, options={"reference_cache": "cache"}, mode="full")
    workload = workload_of(cached(), PREFERENCES)
    assert [role.name for role in workload.roles] == ["policy"]
    before, update, validation = workload.phases
    assert before.copies_base and not update.copies_base and not before.trains
    assert update.parts[0].rows == validation.parts[0].rows == 8  # two answers of each pair


def test_other_modules_have_no_plan(tiny_model):
    with pytest.raises(TypeError, match="no memory plan is known for SFTModule with PromptDataModule"):
        workload_of(stages.sft(tiny_model), PROMPTS)


def test_the_copy_of_the_base_that_the_cache_reads_is_counted(tiny_model):
    """Frozen weights of 16 bits beside trained ones of 32."""
    stage = stages.dpo(tiny_model, options={"reference_cache": "cache"}, mode="full", dtype="bfloat16")
    plan = plan_memory(workload_of(stage, PREFERENCES))
    [policy] = [item.bytes for item in plan.weights]
    before, *others = [{item.name: item.bytes for item in phase.items} for phase in plan.phases]
    assert before["base"] == policy // 2 and all("base" not in items for items in others)


def test_vllm_samples_beside_the_plan(tiny_model, saved):
    """Its weights and its key-value cache are its own; of a full policy it is handed all weights."""
    for mode, handed_over in (("adapters", []), ("full", [("rollout", 0, 1)])):
        roles = {(mode, role): saved[f"{mode} {role}"] for role in ("dpo", "reward")}
        module = stages.full_rto(tiny_model, roles, mode, rollout=RolloutSettings(engine="vllm"))
        workload = workload_of(module, PROMPTS)
        assert workload.phases[0].name == "scoring" and "sampled by vLLM beside" in workload.batch
        assert [part.role for part in workload.phases[0].parts if part.role == "policy"] == ["policy"]
        assert [(p.phase, p.rows, p.batches) for p in workload.passes if p.phase == "rollout"] == handed_over
