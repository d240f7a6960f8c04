"""What the RTO stage refuses: settings, roles and folders."""

import pytest

from rto_lightning.errors import MissingInputError, UserError
from rto_lightning.modules.rto_settings import CriticSettings, PPOSettings, RewardSettings
from rto_lightning.rollout import RolloutSettings
from tests.models import write_tiny_model
from tests.modules import stages
from tests.roles import save_random_role


def test_a_kl_horizon_that_would_end_the_penalty_is_refused_before_training(tiny_model, files, tmp_path):
    rollout = RolloutSettings(max_new_tokens=6, responses_per_prompt=2)
    rewards = RewardSettings(beta_1=0.0, kl_target=50.0, kl_horizon=1)
    module = stages.rto(tiny_model, rewards=rewards, rollout=rollout)
    with pytest.raises(UserError, match="kl_horizon 1 is too short for the 8 responses"):
        stages.fit(module, stages.prompts(files), tmp_path, steps=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rewards": RewardSettings(beta_1=0.1)}, "beta_1 is not 0, which needs a DPO role"),
        ({"reward_function": None}, "beta_3 is not 0, which needs"),
        ({"critic": CriticSettings(init="reward")}, "critic.init is reward, but model.reward is no saved"),
        (
            {
                "critic": CriticSettings(init="reward"),
                "rewards": RewardSettings(beta_1=0.0, beta_3=0.0, truncation_penalty=1.0),
            },
            "critic.init is reward, but rewards.beta_3 is 0",
        ),
        ({"reward": "x"}, "both set"),
    ],
)
def test_contradictions_are_refused_before_anything_is_loaded(tiny_model, options, message):
    with pytest.raises(UserError, match=message):
        stages.rto(tiny_model, **options)


def test_missing_inputs_name_their_stage(tiny_model):
    with pytest.raises(MissingInputError) as error:
        stages.rto(tiny_model, dpo="outputs/a/dpo/role", rewards=RewardSettings())
    assert error.value.stage == "dpo"
    with pytest.raises(MissingInputError) as error:
        stages.rto(tiny_model, reward="outputs/a/rm/role", reward_function=None)
    assert error.value.stage == "reward_model"


def test_minibatches_that_do_not_fit_are_refused(tiny_model, files, tmp_path):
    module = stages.rto(tiny_model, ppo=PPOSettings(minibatch_size=3))
    with pytest.raises(UserError, match="minibatch_size 3 does not divide"):
        stages.fit(module, stages.prompts(files), tmp_path)


def test_scoring_without_statistics_is_refused(tiny_model, files):
    module = stages.rto(tiny_model)
    batch = stages.one_batch(module, files)
    with pytest.raises(UserError, match="measure_score_statistics"):
        module.make_experience(module.rollout(batch, 0), batch.messages)
    module.measure_score_statistics([batch])
    assert module.make_experience(module.rollout(batch, 0), batch.messages).terms.total.isfinite().all()


def test_dpo_role_of_another_reference_is_refused(tiny_model, roles, files, tmp_path):
    sft = stages.fit(stages.sft(tiny_model), stages.demonstrations(files), tmp_path, steps=2)
    sft.save_role(tmp_path / "sft")
    module = stages.full_rto(tiny_model, roles, backbone={"init": str(tmp_path / "sft")})
    with pytest.raises(UserError, match="trained against another reference"):
        module.configure_model()


def test_a_whole_dpo_model_of_another_base_is_refused(tiny_model, roles, tmp_path):
    """Its reference was that base, and not the one that this run has."""
    other = write_tiny_model(tmp_path / "other", seed=5)
    dpo = save_random_role(other, tmp_path / "dpo", "dpo", mode="full")
    with pytest.raises(UserError, match="trained against another reference"):
        stages.full_rto(tiny_model, roles, "full", dpo=dpo).configure_model()
    named = stages.full_rto(tiny_model, roles, "full", dpo=dpo, dpo_reference=str(other))
    named.configure_model()
    assert "dpo_reference" in named.backbone.roles


def test_the_folder_of_a_stage_is_no_role(tiny_model, roles, tmp_path):
    (tmp_path / "role").mkdir()
    with pytest.raises(UserError, match=f"{tmp_path} is the folder of a stage; its role is {tmp_path / 'role'}."):
        stages.full_rto(tiny_model, roles, dpo=str(tmp_path))


@pytest.mark.parametrize(("setting", "role"), [("dpo", "reward"), ("reward", "dpo")])
def test_a_role_of_the_wrong_kind_is_refused(tiny_model, roles, setting, role):
    module = stages.full_rto(tiny_model, roles, **{setting: roles["adapters", role]})
    with pytest.raises(UserError, match=f"saved as the role {role}"):
        module.configure_model()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RewardSettings(kl_target=0.0), "model.rewards.kl_target is 0.0; set it above 0"),
        (lambda: RewardSettings(score_clip=-1.0), "model.rewards.score_clip is -1.0; set it to 0 or more"),
        (lambda: PPOSettings(epochs=0), "model.ppo.epochs is 0; set it above 0"),
        (lambda: RolloutSettings(max_new_tokens=0), "model.rollout.max_new_tokens is 0; set it above 0"),
        (lambda: PPOSettings(dual_clip=1.1), r"dual_clip 1\.1 would cut ratios that clip_range 0\.2 allows"),
        (lambda: PPOSettings(kl_stop=float("nan")), "kl_stop is nan; set it above 0"),
        (lambda: PPOSettings(gamma=1.5), r"gamma is 1\.5; set it between 0 and 1"),
        (lambda: CriticSettings(warmup_iterations=-1), "warmup_iterations is -1; set it to 0 or more"),
        (lambda: RewardSettings(beta_2=0.0, kl_target=3.0), "set beta_2 above 0"),
        (lambda: PPOSettings(kl_stop=0.0), "kl_stop is 0.0; set it above 0"),
        (lambda: PPOSettings(entropy_coefficient=-1.0), "entropy_coefficient is -1.0; set it to 0 or more"),
        (lambda: RewardSettings(short_penalty=1.0), "set both or none"),
        (lambda: RolloutSettings(responses_per_prompt=0), "responses_per_prompt is 0; set it above 0"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
