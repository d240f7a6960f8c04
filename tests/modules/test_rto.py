"""The RTO stage: one iteration, its invariants and its roles."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy

from rto_lightning.backbone import RoleCard
from rto_lightning.callbacks import LogSamples
from rto_lightning.modules import RTOModule
from rto_lightning.modules.rto_settings import CriticSettings, PPOSettings, RewardSettings
from rto_lightning.rollout import RolloutSettings
from tests.models import randomize, some_sequences, write_tiny_classifier, write_tiny_model
from tests.modules import stages

FLOAT64 = {"dtype": "float64"}


@pytest.mark.parametrize("mode", ["adapters", "full"])
def test_every_term_is_trained_on_and_logged(tiny_model, roles, files, tmp_path, mode):
    recorder = stages.Recorder()
    module = stages.full_rto(tiny_model, roles, mode)
    module.configure_model()
    before = {role: [p.clone() for p in module.backbone.trained_parameters(role)] for role in ("policy", "critic")}
    options = {"callbacks": [recorder], "log_every_n_steps": 1, "logger": True}
    stages.fit(module, stages.prompts(files), tmp_path, steps=3, **options)
    for role, weights in before.items():
        trained = module.backbone.trained_parameters(role)
        assert any(not torch.equal(a, b) for a, b in zip(weights, trained, strict=True)), role
    first = recorder.metrics[0]
    assert len(recorder.metrics) == 3
    assert abs(first["train/kl"]) < 1e-5  # the policy starts as the reference
    assert first["train/reward/token"] != 0
    assert recorder.metrics[1]["train/kl"] != 0
    terms = [first[f"train/reward/{name}"] for name in ("token", "kl", "score")]
    assert first["train/reward/total"] == pytest.approx(sum(terms), abs=1e-5)
    expected = {
        "score", "entropy", "policy/loss", "policy/clip_fraction", "policy/approximate_kl", "critic/loss",
        "critic/error", "critic/explained_variance", "response/length", "response/truncated", "seconds/rollout",
        "seconds/scoring", "seconds/update", "samples_per_second", "kl_coefficient", "policy/gradient_norm",
        "critic/gradient_norm",
    }  # fmt: skip
    assert {f"train/{name}" for name in expected} <= set(first)


def test_global_step_counts_iterations(tiny_model, files, tmp_path):
    trainer = stages.trainer(tmp_path, 4)
    module = stages.rto(tiny_model, ppo=PPOSettings(epochs=3, minibatch_size=2, microbatch_size=1))
    trainer.fit(module, stages.prompts(files))
    assert trainer.global_step == 4


def test_first_minibatch_has_ratio_one(tiny_model, files, tmp_path):
    recorder = stages.Recorder()
    options = {"callbacks": [recorder], "log_every_n_steps": 1, "logger": True}
    module = stages.rto(tiny_model, ppo=PPOSettings(epochs=2, minibatch_size=2, microbatch_size=1))
    stages.fit(module, stages.prompts(files), tmp_path, steps=3, **options)
    for metrics in recorder.metrics:
        assert metrics["train/policy/ratio_deviation_first"] < 1e-5
        assert metrics["train/policy/ratio_deviation"] > 1e-4


def _weights_after(module, files, folder, steps=2):
    torch.manual_seed(0)
    module.configure_model()
    stages.fit(module, stages.prompts(files), folder, steps=steps)
    return [p.detach().clone() for role in ("policy", "critic") for p in module.backbone.trained_parameters(role)]


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_microbatches_do_not_change_the_result(tiny_model, files, tmp_path, aggregation):
    weights = []
    for size in (1, 3, 4):
        module = stages.rto(
            tiny_model,
            backbone=FLOAT64,
            ppo=PPOSettings(epochs=2, minibatch_size=4, microbatch_size=size, aggregation=aggregation),
            policy_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
            critic_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        )
        weights.append(_weights_after(module, files, tmp_path))
    for other in weights[1:]:
        for a, b in zip(weights[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_same_seed_same_weights_other_seed_others(tiny_model, files, tmp_path):
    first, again, other = (_weights_after(stages.rto(tiny_model, seed=seed), files, tmp_path) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_rewards_are_those_of_the_roles(tiny_model, roles, files):
    """score() against log-probabilities read role by role."""
    module = stages.full_rto(tiny_model, roles, backbone=FLOAT64, rewards=RewardSettings(token_reward_clip=0.0))
    batch = stages.one_batch(module, files)
    trajectory = module.rollout(batch, 0)
    experience = module.make_experience(trajectory, batch.messages)
    sequences = trajectory.sequences
    with torch.no_grad():
        dpo, _ = module.backbone.token_logprobs("dpo", sequences)
        reference, _ = module.backbone.token_logprobs("reference", sequences)
        scores = module.backbone.sequence_scores("reward", sequences)
    torch.testing.assert_close(experience.terms.token, 0.05 * (dpo - reference), rtol=0, atol=1e-9)
    card = RoleCard.read(Path(roles["adapters", "reward"]))
    last = experience.terms.score[torch.arange(4), sequences.response_lengths - 1]
    expected = ((scores - card.score_mean) / card.score_std).float()
    torch.testing.assert_close(last.float(), expected, rtol=1e-4, atol=1e-4)
    assert (experience.terms.score != 0).sum() == 4
    with torch.no_grad():
        critic = module.backbone.sequence_scores("critic", sequences)
    torch.testing.assert_close(critic.float(), expected, rtol=1e-4, atol=1e-4)


def test_temperature_scales_policy_and_reference_but_not_dpo(tiny_model, roles, files):
    options = {"backbone": FLOAT64, "rewards": RewardSettings(token_reward_clip=0.0)}
    warm = stages.full_rto(tiny_model, roles, rollout=RolloutSettings(max_new_tokens=6, temperature=0.7), **options)
    batch = stages.one_batch(warm, files)
    trajectory = warm.rollout(batch, 0)
    experience = warm.make_experience(trajectory, batch.messages)
    with torch.no_grad():
        at_temperature, _ = warm.backbone.token_logprobs("policy", trajectory.sequences, 0.7)
    torch.testing.assert_close(experience.logprobs, at_temperature, rtol=0, atol=1e-12)
    torch.testing.assert_close(experience.kl, torch.zeros_like(experience.kl), rtol=0, atol=1e-12)
    cold = stages.full_rto(tiny_model, roles, **options)
    cold.configure_model()
    expected = cold.make_experience(trajectory, batch.messages).terms.token
    torch.testing.assert_close(experience.terms.token, expected, rtol=0, atol=1e-9)


def test_plain_ppo_loads_no_dpo_role(tiny_model):
    module = stages.rto(tiny_model)
    module.configure_model()
    assert set(module.backbone.roles) == {"reference", "policy", "critic"}


def test_without_score_no_reward_model_is_needed(tiny_model, roles, files, tmp_path):
    module = stages.rto(
        tiny_model, dpo=roles["adapters", "dpo"], reward_function=None, rewards=RewardSettings(beta_3=0.0)
    )
    stages.fit(module, stages.prompts(files), tmp_path, steps=1)
    assert "reward" not in module.backbone.roles


def test_outside_models_for_dpo_and_reward(tiny_model, files, tmp_path):
    """A full-weight DPO model and a classifier of another width beside a LoRA policy."""
    recorder = stages.Recorder()
    module = stages.rto(
        tiny_model,
        dpo=str(write_tiny_model(tmp_path / "dpo", seed=3)),
        reward=str(write_tiny_classifier(tmp_path / "rm")),
        reward_function=None,
        rewards=RewardSettings(normalization_samples=8),
    )
    options = {"callbacks": [recorder], "log_every_n_steps": 1, "logger": True}
    stages.fit(module, stages.prompts(files), tmp_path / "run", steps=2, **options)
    assert recorder.metrics[0]["train/reward/token"] != 0
    assert module.scores.ready


def test_scores_are_normalised_on_the_reference(tiny_model, files, tmp_path):
    recorder = stages.Recorder()
    module = stages.rto(tiny_model, rewards=RewardSettings(beta_1=0.0, beta_2=0.0, normalization_samples=12))
    options = {"callbacks": [recorder], "log_every_n_steps": 1, "logger": True}
    stages.fit(module, stages.prompts(files), tmp_path, steps=1, **options)
    mean, std = module.scores.normalizer().mean_std.tolist()
    metrics = recorder.metrics[0]
    assert metrics["train/reward/score"] == pytest.approx((metrics["train/score"] - mean) / std, abs=1e-5)


def test_critic_warmup_leaves_the_policy(tiny_model, files, tmp_path):
    trainer = stages.trainer(tmp_path, 2)
    module = stages.rto(tiny_model, critic=CriticSettings(init="policy", warmup_iterations=2))
    module.configure_model()
    before = [p.clone() for p in module.backbone.trained_parameters("policy")]
    critic = [p.clone() for p in module.backbone.trained_parameters("critic")]
    trainer.fit(module, stages.prompts(files))
    assert trainer.global_step == 2
    after = module.backbone.trained_parameters("policy")
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    trained = module.backbone.trained_parameters("critic")
    assert not all(torch.equal(a, b) for a, b in zip(critic, trained, strict=True))


def test_critic_from_a_folder(tiny_model, roles):
    folder = roles["adapters", "reward"]
    module = stages.full_rto(tiny_model, roles, critic=CriticSettings(init=folder))
    by_name = stages.full_rto(tiny_model, roles)
    for each in (module, by_name):
        each.configure_model()
    values, expected = (each.backbone.token_values("critic", some_sequences()) for each in (module, by_name))
    assert torch.equal(values, expected)  # in normalised units, as with init: reward
    assert values.abs().sum() > 0


def test_adaptive_kl_coefficient_moves_toward_the_target(tiny_model, files, tmp_path):
    module = stages.rto(tiny_model, rewards=RewardSettings(beta_1=0.0, kl_target=50.0, kl_horizon=40))
    recorder = stages.Recorder()
    options = {"callbacks": [recorder], "log_every_n_steps": 1, "logger": True}
    stages.fit(module, stages.prompts(files), tmp_path, steps=2, **options)
    assert float(module.kl_coefficient) < 0.01  # KL far below the target: the penalty shrinks
    assert recorder.metrics[0]["train/kl_coefficient"] == pytest.approx(0.01)  # what the iteration used
    assert recorder.metrics[1]["train/kl_coefficient"] < 0.00999
    fixed = stages.rto(tiny_model)
    stages.fit(fixed, stages.prompts(files), tmp_path, steps=2)
    assert float(fixed.kl_coefficient) == 0.01


def test_truncation_is_penalised_and_tokens_are_left_alone(tiny_model, files):
    module = stages.rto(
        tiny_model, rewards=RewardSettings(beta_1=0.0, beta_3=0.0, truncation_penalty=3.0), reward_function=None
    )
    batch = stages.one_batch(module, files)
    trajectory = module.rollout(batch, 0)
    assert trajectory.truncated.any()
    before = trajectory.sequences.input_ids.clone()
    terms = module.make_experience(trajectory, batch.messages).terms
    assert torch.equal(terms.score.sum(1), -3.0 * trajectory.truncated.float())
    assert torch.equal(trajectory.sequences.input_ids, before)


def test_validation_changes_nothing_and_repeats_its_draws(tiny_model, files, tmp_path):
    module = stages.rto(tiny_model, rewards=RewardSettings(beta_1=0.0, normalize_score=False))
    module.configure_model()
    before = [p.clone() for p in module.parameters()]
    first, second = (stages.trainer(tmp_path, 0).test(module, stages.prompts(files), verbose=False) for _ in range(2))
    assert first == second
    assert "test/reward/total" in first[0] and "test/kl" in first[0]
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_trained_policy_is_saved_reloaded_and_used(tiny_model, files, tmp_path):
    module = stages.fit(stages.rto(tiny_model), stages.prompts(files), tmp_path, steps=3)
    module.save_role(tmp_path / "role")
    expected = stages.trainer(tmp_path, 0).predict(module, stages.prompts(files))
    again = stages.rto(tiny_model, trained=str(tmp_path / "role"))
    answers = stages.trainer(tmp_path, 0).predict(again, stages.prompts(files))
    assert answers == expected
    untrained = stages.trainer(tmp_path, 0).predict(stages.rto(tiny_model), stages.prompts(files))
    assert answers != untrained
    assert answers[0][0]["prompt"] == [{"role": "user", "content": "Question 0?"}]


@pytest.mark.parametrize("role", ["policy", "critic"])
def test_recomputation_does_not_change_gradients(tiny_model, files, roles, role):
    """Backward computes the activations again: as the role whose loss it is, not as another."""
    plain, recomputing = (
        stages.full_rto(tiny_model, roles, backbone={**FLOAT64, "gradient_checkpointing": checkpointing})
        for checkpointing in (False, True)
    )
    batch = stages.one_batch(plain, files)
    recomputing.configure_model()
    for number, name in enumerate(("policy", "critic")):
        randomize(plain.backbone.trained_parameters(name), number)
    recomputing.backbone.load_state_dict(plain.backbone.state_dict())
    sequences = plain.rollout(batch, 0).sequences
    for module in (plain, recomputing):
        with module.backbone.play(role):
            if role == "policy":
                output, _ = module.backbone.token_logprobs(role, sequences)
            else:
                output = module.backbone.token_values(role, sequences)
            module.backward(output.square().sum())
    expected, found = (module.backbone.trained_parameters(role) for module in (plain, recomputing))
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-9)
    assert sum(float(parameter.grad.abs().sum()) for parameter in expected) > 0


def test_test_without_statistics_measures_them(tiny_model, files, tmp_path):
    [metrics] = stages.trainer(tmp_path, 0).test(stages.rto(tiny_model), stages.prompts(files), verbose=False)
    assert metrics["test/reward/score"] == metrics["test/reward/score"]  # not nan
    assert metrics["test/reward/total"] == pytest.approx(metrics["test/reward/score"], abs=1e-5)


def test_saved_policy_brings_the_score_statistics(tiny_model, files, tmp_path):
    module = stages.fit(stages.rto(tiny_model), stages.prompts(files), tmp_path, steps=1)
    module.save_role(tmp_path / "role")
    again = stages.rto(tiny_model, trained=str(tmp_path / "role"))
    again.configure_model()
    assert torch.equal(again.scores.normalizer().mean_std, module.scores.normalizer().mean_std)


def test_prediction_loads_the_policy_alone(tiny_model, roles, files, tmp_path):
    module = stages.full_rto(tiny_model, roles)
    stages.trainer(tmp_path, 0).predict(module, stages.prompts(files))
    assert set(module.backbone.roles) == {"reference", "policy"}


def test_full_mode_critic_is_free_of_adapters(tiny_model, roles):
    """The frozen base holds the DPO adapter by then; a copy of it would carry the adapter along."""
    module = stages.full_rto(
        tiny_model,
        {("full", "dpo"): roles["adapters", "dpo"], ("full", "reward"): roles["full", "reward"]},
        "full",
        critic=CriticSettings(init="policy"),
    )
    module.configure_model()
    assert not any("lora" in name for name, _ in module.backbone.models["critic"].named_parameters())


def test_seed_everything_reaches_rollouts_and_data(tiny_model, files, monkeypatch):
    seeds = []
    for seed in ("3", "4"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        seeds.append((stages.rto(tiny_model).seed, stages.prompts(files).seed))
    assert seeds == [(3, 3), (4, 4)]
    assert stages.rto(tiny_model, seed=7).seed == 7


@pytest.mark.parametrize("sanity", [0, 1], ids=["", "sanity check"])
def test_where_checkpoints_are_read_late_a_resumed_run_measures_no_scores(
    tiny_model, files, tmp_path, monkeypatch, sanity
):
    """As under FSDP, which reads them after `on_fit_start`."""
    measured = []
    measure = RTOModule.measure_score_statistics

    def counting(module, *arguments):
        measured.append(module.global_step)
        measure(module, *arguments)

    monkeypatch.setattr(RTOModule, "measure_score_statistics", counting)
    callbacks = [ModelCheckpoint(tmp_path, filename="{step}"), LogSamples(prompts=2)]
    options = {"enable_checkpointing": True, "callbacks": callbacks}
    early = stages.rto(tiny_model, seed=1)
    stages.trainer(tmp_path, 1).fit(early, stages.prompts(files))
    assert measured == [0]

    monkeypatch.setattr(SingleDeviceStrategy, "restore_checkpoint_after_setup", True)
    late, trainer = stages.rto(tiny_model, seed=1), stages.trainer(tmp_path, 1, **options)
    trainer.num_sanity_val_steps = sanity
    trainer.fit(late, stages.prompts(files))
    assert measured == [0, 0] and late.scores.statistics() == early.scores.statistics()
    resumed = stages.rto(tiny_model, seed=1)
    stages.trainer(tmp_path, 2).fit(resumed, stages.prompts(files), ckpt_path=tmp_path / "step=1.ckpt")
    assert measured == [0, 0] and resumed.scores.statistics() == early.scores.statistics()


def test_a_run_goes_on_from_its_checkpoint(tiny_model, files, tmp_path):
    whole = stages.rto(tiny_model, seed=1)
    torch.manual_seed(0)
    stages.fit(whole, stages.prompts(files), tmp_path, steps=6)
    torch.manual_seed(0)
    checkpoints = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    options = {"enable_checkpointing": True, "callbacks": [checkpoints]}
    stages.fit(stages.rto(tiny_model, seed=1), stages.prompts(files), tmp_path, 5, **options)
    resumed = stages.rto(tiny_model, seed=1)
    trainer = stages.trainer(tmp_path, 6)
    trainer.fit(resumed, stages.prompts(files), ckpt_path=tmp_path / "step=4.ckpt")
    assert trainer.global_step == 6
    for role in ("policy", "critic"):
        pairs = zip(whole.backbone.trained_parameters(role), resumed.backbone.trained_parameters(role), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), role
