"""RTO with six roles on one frozen base, in float32 and in 4 bits: who gets gradients, what moves and what does not."""

import csv

import pytest
import torch
import yaml

from rto_lightning.cli import main
from rto_lightning.modules.rto_settings import PPOSettings, RewardSettings
from tests.models import randomize
from tests.modules import stages
from tests.plain_peft import plain_logprobs, plain_model
from tests.roles import save_random_role

BASES = {
    "float64": {"dtype": "float64"},
    "float32": {},
    "nf4": {"quantization": "nf4"},
}
TRAINED = ("policy", "critic")


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory):
    """Saved roles with random weights: two SFT adapters, dpo and reward."""
    folder = tmp_path_factory.mktemp("one_base")
    torch.manual_seed(0)
    kinds = {"sft": "policy", "other": "policy", "dpo": "dpo", "reward": "reward"}
    return {name: save_random_role(tiny_model, folder / name, kind) for name, kind in kinds.items()}


def _module(model, folders, base, checkpointing=False, **options):
    """All six roles: the reference is one SFT adapter, the DPO role's reference another."""
    torch.manual_seed(0)
    return stages.full_rto(
        model,
        {("adapters", "dpo"): folders["dpo"], ("adapters", "reward"): folders["reward"]},
        backbone={**BASES[base], "init": folders["sft"], "gradient_checkpointing": checkpointing},
        dpo_reference=folders["other"],
        seed=1,
        **options,
    )


class _Recorder(torch.optim.Adam):
    """Keeps the gradients of each step, and the names of frozen weights that had one."""

    def __init__(self, parameters, backbone):
        super().__init__(parameters, lr=1e-2)
        self.backbone, self.steps, self.strangers = backbone, [], []

    def step(self, closure=None):
        self.steps.append([None if p.grad is None else p.grad.clone() for p in self.param_groups[0]["params"]])
        trained = {id(weight) for role in TRAINED for weight in self.backbone.trained_parameters(role)}
        named = self.backbone.named_parameters()
        self.strangers += [name for name, weight in named if weight.grad is not None and id(weight) not in trained]
        return super().step(closure)


def _recorded(module):
    """The module loaded, with an optimizer that keeps gradients for each of policy and critic."""
    module.configure_model()
    recorders = {}

    def recorder(role):
        def make(parameters):
            recorders[role] = _Recorder(parameters, module.backbone)
            return recorders[role]

        return make

    module.optimizer, module.critic_optimizer = recorder("policy"), recorder("critic")
    return recorders


def _frozen(module):
    """Copies of all that no optimizer moves, quantization statistics included."""
    trained = {id(weight) for role in TRAINED for weight in module.backbone.trained_parameters(role)}
    moving = {name for name, weight in module.backbone.named_parameters() if id(weight) in trained}
    return {name: value.clone() for name, value in module.backbone.state_dict().items() if name not in moving}


@pytest.fixture(scope="module", params=["float32", "nf4"])
def run(request, tiny_model, files, folders, tmp_path_factory):
    """Three iterations: the module, its recorders, logged metrics, and the frozen weights before them."""
    # Nothing is clipped: a minibatch whose ratios all are would have no gradient.
    ppo = PPOSettings(epochs=2, microbatch_size=2, clip_range=100.0, value_clip_range=None)
    module = _module(tiny_model, folders, request.param, ppo=ppo)
    recorders = _recorded(module)
    before = _frozen(module)
    metrics = stages.recorded_fit(module, files, tmp_path_factory.mktemp("run"), steps=3)
    return module, recorders, metrics, before


def test_every_trained_weight_gets_a_gradient_in_every_step_and_no_other(run):
    module, recorders, _, _ = run
    assert set(module.backbone.roles) == {"reference", "policy", "critic", "dpo", "dpo_reference", "reward"}
    for role in TRAINED:
        recorder = recorders[role]
        assert len(recorder.steps) == 3 * 2
        assert not recorder.strangers, role
        for gradients in recorder.steps:
            assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients), role


def test_frozen_weights_stay_as_they_are_to_the_last_bit(run):
    module, _, _, before = run
    after = _frozen(module)
    assert len(before) > 100 and before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert not changed


def test_the_ratio_starts_at_one_in_each_iteration(run):
    for metrics in run[2]:
        assert metrics["train/policy/ratio_deviation_first"] < 1e-5
        assert metrics["train/policy/ratio_deviation"] > 1e-4


def test_the_policy_starts_as_the_reference_and_leaves_it(run):
    kl = [abs(metrics["train/kl"]) for metrics in run[2]]
    assert kl[0] < 1e-5 and all(value > 1e-5 for value in kl[1:])


@pytest.mark.parametrize("base", list(BASES))
def test_recomputation_leaves_the_gradients_of_an_update(tiny_model, files, folders, tmp_path, base):
    steps = []
    for checkpointing in (False, True):
        ppo = PPOSettings(microbatch_size=2, policy_gradient_clip_val=None, critic_gradient_clip_val=None)
        module = _module(tiny_model, folders, base, checkpointing, ppo=ppo)
        recorders = _recorded(module)
        for number, role in enumerate(TRAINED):
            randomize(module.backbone.trained_parameters(role), number)
        stages.fit(module, stages.prompts(files), tmp_path, steps=1)
        steps.append({role: recorder.steps[0] for role, recorder in recorders.items()})
    for role in TRAINED:
        assert all(gradient.abs().sum() > 0 for gradient in steps[0][role])
        for expected, found in zip(steps[0][role], steps[1][role], strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 if base == "float64" else 1e-6)


@pytest.mark.parametrize("base", list(BASES))
def test_reference_and_dpo_reference_may_be_two_sft_adapters(tiny_model, files, folders, base):
    module = _module(tiny_model, folders, base, rewards=RewardSettings(beta_1=0.5, token_reward_clip=0.0))
    batch = stages.one_batch(module, files)
    trajectory = module.rollout(batch, 0)
    experience = module.make_experience(trajectory, batch.messages)
    dtype, nf4 = BASES[base].get("dtype", "float32"), "quantization" in BASES[base]
    sft, other, dpo = (
        plain_logprobs(plain_model(tiny_model, folders[name], dtype, nf4), trajectory.sequences)
        for name in ("sft", "other", "dpo")
    )
    close = {"rtol": 0, "atol": 1e-9 if base == "float64" else 1e-4}
    torch.testing.assert_close(experience.logprobs, sft, **close)
    torch.testing.assert_close(experience.terms.token, 0.5 * (dpo - other), **close)
    torch.testing.assert_close(experience.kl, torch.zeros_like(experience.kl), **close)
    assert min((sft - other).abs().max(), (dpo - other).abs().max()) > 0.01


def _fit_by_command(model, files, folders, folder, lr):
    """Losses of policy and critic in two iterations of two epochs, by the command line."""
    optimizer = {"class_path": "torch.optim.Adam", "init_args": {"lr": lr}}
    stage = {
        "seed_everything": 1,
        "model": {
            "class_path": "RTOModule",
            "init_args": {
                "backbone": {"model": str(model), "quantization": "nf4", "lora": {"rank": 4, "alpha": 8}},
                "dpo": folders["dpo"],
                "reward": folders["reward"],
                "rollout": {"max_new_tokens": 6},
                "ppo": {"epochs": 2, "microbatch_size": 2},
                "policy_optimizer": optimizer,
                "critic_optimizer": optimizer,
            },
        },
        "data": {
            "class_path": "PromptDataModule",
            "init_args": {"train": files["prompts"], "batch_size": 4, "max_prompt_tokens": 100},
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 2,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(folder),
        },
    }
    folder.with_suffix(".yaml").write_text(yaml.safe_dump(stage))
    assert main(["fit", "--config", str(folder.with_suffix(".yaml"))]) == 0
    with (folder / "metrics" / "fit" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/policy/loss"]]
    return [[float(row[f"train/{name}/loss"]) for row in rows] for name in ("policy", "critic")]


def test_qlora_by_command_trains_policy_and_critic(tiny_model, files, folders, tmp_path):
    """On some CPUs the first rollout would leave a 4-bit base without gradients, and nothing would say so."""
    still = _fit_by_command(tiny_model, files, folders, tmp_path / "still", 0.0)
    moving = _fit_by_command(tiny_model, files, folders, tmp_path / "moving", 1e-2)
    for without, losses in zip(still, moving, strict=True):
        assert losses[0] < without[0]  # the second epoch of an iteration finds a lower loss than the first
        assert abs(losses[1] - without[1]) > 1e-4
