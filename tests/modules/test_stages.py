"""SFT, preference and reward-model stages: the loss falls, the role is saved, the next stage can read it."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from rto_lightning.backbone import RoleCard
from rto_lightning.errors import MissingInputError, UserError
from rto_lightning.modules import PreferenceModule, RewardModelModule, SFTModule
from rto_lightning.modules.reward_model import ScoreStatisticsSettings
from tests.models import make_backbone
from tests.modules import stages
from tests.roles import save_random_role

MODES = ["adapters", "full"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stage", ["sft", "dpo", "reward_model"])
def test_stage_learns_and_saves_its_role(tiny_model, files, tmp_path, mode, stage):
    torch.manual_seed(0)
    recorder = stages.Recorder()
    data = stages.demonstrations(files) if stage == "sft" else stages.preferences(files)
    module = getattr(stages, stage)(tiny_model, mode=mode)
    options = {"callbacks": [recorder], "log_every_n_steps": 1, "logger": True}
    stages.fit(module, data, tmp_path, steps=15, **options)
    losses = [metrics["train/loss"] for metrics in recorder.metrics]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    module.save_role(tmp_path / "role")
    card = RoleCard.read(tmp_path / "role")
    assert card.role == module.saved_as
    assert card.kind == ("adapter" if mode == "adapters" else "model")


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_preference_loss_starts_at_its_value_for_equal_policies(tiny_model, files, tmp_path, loss):
    recorder = stages.Recorder()
    options = {"callbacks": [recorder], "log_every_n_steps": 1, "logger": True}
    stages.fit(stages.dpo(tiny_model, loss=loss), stages.preferences(files), tmp_path, steps=1, **options)
    expected = {"dpo": 0.6931472, "ipo": 25.0}[loss]  # -log sigmoid(0), and (0 - 1 / (2 * 0.1))^2
    assert recorder.metrics[0]["train/loss"] == pytest.approx(expected, abs=1e-5)
    assert recorder.metrics[0]["train/accuracy"] == 0.5


def test_dpo_test_reports_accuracies_beside_the_baselines(tiny_model, files, tmp_path):
    module = stages.fit(stages.dpo(tiny_model), stages.preferences(files), tmp_path / "a", steps=15)
    module.save_role(tmp_path / "role")
    again = stages.dpo(tiny_model, trained=str(tmp_path / "role"))
    [metrics] = stages.trainer(tmp_path, 0).test(again, stages.preferences(files), verbose=False)
    assert metrics["test/dpo_reward/accuracy"] > 0.9
    assert metrics["test/dpo_reward/low"] <= metrics["test/dpo_reward/accuracy"] <= metrics["test/dpo_reward/high"]
    assert metrics["test/pairs"] == 12
    # By hand: lengths 3, 4, 5 against 2, 3, 4, 5 in turn; a tie counts half.
    chosen, rejected = [3 + n % 3 for n in range(12)], [2 + n % 4 for n in range(12)]
    expected = sum((c > r) + 0.5 * (c == r) for c, r in zip(chosen, rejected, strict=True)) / 12
    assert metrics["test/longer_answer/accuracy"] == pytest.approx(expected)


def test_dpo_role_remembers_beta(tiny_model, files, tmp_path):
    module = stages.fit(stages.dpo(tiny_model), stages.preferences(files), tmp_path, steps=1)
    module.save_role(tmp_path / "role")
    assert RoleCard.read(tmp_path / "role").settings["beta"] == 0.1


@pytest.mark.parametrize("mode", MODES)
def test_reward_role_brings_its_score_statistics(tiny_model, files, tmp_path, mode, monkeypatch):
    module = stages.reward_model(tiny_model, mode=mode)
    seen = []

    def remember(*arguments):
        seen.append(type(module)._score_reference_answers(module, *arguments))
        return seen[-1]

    monkeypatch.setattr(module, "_score_reference_answers", remember)
    stages.fit(module, stages.preferences(files), tmp_path, steps=5)
    module.save_role(tmp_path / "role")
    card = RoleCard.read(tmp_path / "role")
    scores = torch.cat(seen)
    assert len(scores) == 8
    assert card.score_mean == pytest.approx(scores.mean().item())
    assert card.score_std == pytest.approx(scores.std(correction=0).item())
    assert card.score_std > 0


def test_checkpoint_holds_trained_weights_only_and_resumes(tiny_model, files, tmp_path):
    torch.manual_seed(0)
    whole = stages.fit(stages.dpo(tiny_model), stages.preferences(files), tmp_path / "whole", steps=6)
    torch.manual_seed(0)
    path = tmp_path / "half.ckpt"
    checkpoints = ModelCheckpoint(tmp_path, filename="half", every_n_train_steps=4, enable_version_counter=False)
    stages.fit(
        stages.dpo(tiny_model),
        stages.preferences(files),
        tmp_path,
        5,
        enable_checkpointing=True,
        callbacks=[checkpoints],
    )
    weights = torch.load(path, weights_only=True)["state_dict"]
    assert weights and all("lora" in name and "policy" in name for name in weights)
    resumed = stages.dpo(tiny_model)
    stages.trainer(tmp_path / "rest", 6).fit(resumed, stages.preferences(files), ckpt_path=path)
    for a, b in zip(
        whole.backbone.trained_parameters("policy"), resumed.backbone.trained_parameters("policy"), strict=True
    ):
        assert torch.equal(a, b)


def test_next_stage_starts_from_the_sft_adapter(tiny_model, files, tmp_path):
    module = stages.fit(stages.sft(tiny_model), stages.demonstrations(files), tmp_path, steps=5)
    module.save_role(tmp_path / "sft")
    from tests.models import some_sequences

    dpo = stages.dpo(tiny_model, init=str(tmp_path / "sft"))
    dpo.configure_model()
    expected, _ = module.backbone.token_logprobs("policy", some_sequences())
    for role in ("policy", "reference"):
        logprobs, _ = dpo.backbone.token_logprobs(role, some_sequences())
        torch.testing.assert_close(logprobs, expected, rtol=0, atol=0)
    base = make_backbone(tiny_model, dtype="float32")
    base.add_role("reference")
    assert not torch.allclose(base.token_logprobs("reference", some_sequences())[0], expected)


def test_the_reward_model_starts_from_the_sft_adapter(tiny_model, files, tmp_path):
    sft = save_random_role(tiny_model, tmp_path / "sft", "policy")
    module = stages.fit(stages.reward_model(tiny_model, init=sft), stages.preferences(files), tmp_path / "run", steps=1)
    module.save_role(tmp_path / "reward")
    card = RoleCard.read(tmp_path / "reward")
    assert card is not None and card.role == "reward" and card.init_fingerprint is not None
    again = stages.reward_model(tiny_model, init=sft)
    again.configure_model()
    start = load_file(f"{sft}/adapter_model.safetensors")
    started = [weight for name, weight in again.named_parameters() if "lora_A" in name and ".reward." in name]
    assert len(started) == sum("lora_A" in name for name in start)
    assert sorted(weight.sum().item() for weight in started) == pytest.approx(
        sorted(weight.sum().item() for name, weight in start.items() if "lora_A" in name)
    )


@pytest.mark.parametrize(
    ("module", "saved"), [(PreferenceModule, "reward"), (SFTModule, "reward"), (RewardModelModule, "dpo")]
)
def test_a_role_of_another_kind_is_not_trained_further(tiny_model, tmp_path, module, saved):
    trained = save_random_role(tiny_model, tmp_path / "role", saved)
    with pytest.raises(UserError, match=f"was saved as the role {saved} and cannot be used as"):
        module(stages.settings(tiny_model), trained=trained)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_precision_that_rounds_trained_weights_is_refused(tiny_model, files, tmp_path, precision):
    with pytest.raises(UserError, match=precision):
        stages.fit(stages.sft(tiny_model), stages.demonstrations(files), tmp_path, precision=precision)


def test_missing_init_names_the_stage(tiny_model):
    with pytest.raises(MissingInputError, match="outputs/sft/role does not exist"):
        stages.sft(tiny_model, init="outputs/sft/role")


def test_label_smoothing_belongs_to_dpo(tiny_model):
    from rto_lightning.modules import PreferenceModule

    with pytest.raises(UserError, match="does not go with loss ipo"):
        PreferenceModule(stages.settings(tiny_model), loss="ipo", label_smoothing=0.2)


def test_init_that_is_a_full_model_is_refused(tiny_model):
    with pytest.raises(UserError, match=r"is no adapter; set model\.backbone\.model to it"):
        stages.dpo(tiny_model, init=str(tiny_model))


def test_reward_role_survives_scores_without_spread(tiny_model, files, tmp_path):
    module = stages.reward_model(tiny_model)
    module.score_statistics = ScoreStatisticsSettings(samples=1, max_new_tokens=6)
    with pytest.warns(UserWarning, match="saved without score statistics"):
        stages.fit(module, stages.preferences(files), tmp_path, steps=1)
    module.save_role(tmp_path / "role")
    assert RoleCard.read(tmp_path / "role").score_mean is None
