"""The preference stage with each of its losses: what it computes, logs, saves and refuses."""

import math

import pytest
import torch

from rto_lightning.algorithms import dpo_loss, ipo_loss, rdpo_loss, simpo_loss, tdpo1_loss, tdpo2_loss
from rto_lightning.backbone import RoleCard
from rto_lightning.backbone.fingerprints import adapter_fingerprint
from rto_lightning.errors import UserError
from rto_lightning.modules import PreferenceModule
from rto_lightning.modules.rto_settings import RewardSettings
from tests.models import randomize, some_sequences
from tests.modules import stages

LOSSES = ["dpo", "ipo", "rdpo", "simpo", "tdpo1", "tdpo2"]
BASELINES = {"longer_answer", "reference_logprob", "reference_logprob_per_token"}


def one_batch(module, files):
    """The module with its roles loaded and its policy moved, and a batch of pairs, outside of a trainer."""
    module.configure_model()
    if "reference" not in module.backbone.roles:
        module.add_reference()
    randomize(module.backbone.trained_parameters("policy"), scale=0.05)
    data = stages.preferences(files)
    data.chat = module.chat
    data.setup("fit")
    return next(iter(data.train_dataloader()))


def fit_and_record(module, files, folder, steps):
    recorder = stages.Recorder()
    options = {"callbacks": [recorder], "log_every_n_steps": 1, "logger": True}
    stages.fit(module, stages.preferences(files), folder, steps=steps, **options)
    return recorder.metrics


def expected_loss(module, batch, loss):
    """The loss of a batch from log-probabilities and divergences that are read role by role."""
    sequences = batch.sequences
    lengths = sequences.response_lengths.double().chunk(2)
    if loss.startswith("tdpo"):
        numbers = module.backbone.token_divergence("policy", "reference", sequences)
    else:
        numbers = (module.backbone.token_logprobs(role, sequences)[0] for role in ("policy", "reference"))
    policy, reference, *kl = (x.sum(1).chunk(2) for x in numbers)
    answers = (*policy, *reference)
    return {
        "dpo": lambda: dpo_loss(*answers, beta=0.1, label_smoothing=0.2),
        "ipo": lambda: ipo_loss(*answers, beta=0.1),
        "rdpo": lambda: rdpo_loss(*answers, *lengths, beta=0.1, length_coefficient=0.05),
        "simpo": lambda: simpo_loss(policy[0] / lengths[0], policy[1] / lengths[1], beta=2.5, margin=0.7),
        "tdpo1": lambda: tdpo1_loss(*answers, *kl[0], beta=0.1),
        "tdpo2": lambda: tdpo2_loss(*answers, *kl[0], beta=0.1, kl_coefficient=0.6),
    }[loss]()


OWN_OPTIONS = {
    "dpo": {"label_smoothing": 0.2},
    "ipo": {},
    "rdpo": {"length_coefficient": 0.05},
    "simpo": {"margin": 0.7},
    "tdpo1": {},
    "tdpo2": {"kl_coefficient": 0.6},
}


@pytest.mark.filterwarnings("ignore:You are trying to .self.log")
@pytest.mark.parametrize("loss", LOSSES)
def test_training_step_is_the_chosen_loss_with_its_setting(tiny_model, files, loss):
    module = stages.dpo(tiny_model, loss=loss, options=OWN_OPTIONS[loss], dtype="float64", logprob_chunk_tokens=7)
    batch = one_batch(module, files)
    actual = module.training_step(batch, 0)
    expected = expected_loss(module, batch, loss).losses.mean()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)
    module.backward(actual)
    gradients = [parameter.grad.clone() for parameter in module.backbone.trained_parameters("policy")]
    module.zero_grad()
    module.backward(expected)
    for gradient, parameter in zip(gradients, module.backbone.trained_parameters("policy"), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=0, atol=1e-9)
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients)


@pytest.mark.parametrize("mode", ["adapters", "full"])
@pytest.mark.parametrize("loss", ["rdpo", "simpo", "tdpo1", "tdpo2"])
def test_each_loss_learns_and_logs_every_metric(tiny_model, files, tmp_path, loss, mode):
    torch.manual_seed(0)
    metrics = fit_and_record(stages.dpo(tiny_model, loss=loss, mode=mode), files, tmp_path, steps=15)
    losses = [step["train/loss"] for step in metrics]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert sum(step["train/accuracy"] for step in metrics[-3:]) > 2.7
    names = {"loss", "accuracy", "margin"}
    sides = {"reward", "logprob", "length"} | ({"kl"} if loss.startswith("tdpo") else set())
    names |= {f"{name}_{side}" for name in sides for side in ("chosen", "rejected")}
    for step in metrics:
        assert {name for name in step if name.startswith("train/")} == {f"train/{name}" for name in names}
        assert step["train/margin"] == pytest.approx(
            step["train/reward_chosen"] - step["train/reward_rejected"], abs=1e-4
        )
        assert 3 <= step["train/length_chosen"] <= 6 and step["train/logprob_chosen"] < 0
    if loss.startswith("tdpo"):
        assert metrics[0]["train/kl_chosen"] == metrics[0]["train/kl_rejected"] == 0
        assert metrics[-1]["train/kl_chosen"] > 0 and metrics[-1]["train/kl_rejected"] > 0


@pytest.mark.parametrize("loss", ["rdpo", "tdpo1", "tdpo2"])
def test_policy_that_is_the_reference_has_no_margin_but_that_of_the_lengths(tiny_model, files, tmp_path, loss):
    alpha = 0.05
    options = {"length_coefficient": alpha} if loss == "rdpo" else {}
    [step] = fit_and_record(stages.dpo(tiny_model, loss=loss, options=options), files, tmp_path, steps=1)
    if loss == "rdpo":
        lengths = step["train/length_chosen"] - step["train/length_rejected"]
        assert step["train/margin"] == pytest.approx(alpha * lengths, abs=1e-6)
    else:
        assert step["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert step["train/margin"] == 0 and step["train/accuracy"] == 0.5


def test_simpo_reads_no_reference_until_it_is_tested(tiny_model, files, tmp_path):
    module = stages.dpo(tiny_model, loss="simpo", mode="full")
    stages.fit(module, stages.preferences(files), tmp_path, steps=15)
    assert set(module.backbone.roles) == {"policy"}
    assert set(module.backbone.models) == {"policy"}  # no copy of the base model that nobody reads
    trained = [parameter.clone() for parameter in module.backbone.trained_parameters("policy")]
    [metrics] = stages.trainer(tmp_path, 0).test(module, stages.preferences(files), verbose=False)
    assert set(module.backbone.roles) == {"policy", "reference"}
    assert {f"test/{name}/accuracy" for name in BASELINES} <= set(metrics)
    assert metrics["test/implicit_reward/accuracy"] > 0.9
    for before, after in zip(trained, module.backbone.trained_parameters("policy"), strict=True):
        assert torch.equal(before, after) and after.requires_grad


@pytest.mark.parametrize("loss", LOSSES)
def test_test_ranks_by_the_reward_of_the_loss_beside_that_of_rto(tiny_model, files, tmp_path, loss):
    module = stages.dpo(tiny_model, loss=loss)
    [metrics] = stages.trainer(tmp_path, 0).test(module, stages.preferences(files), verbose=False)
    scores = {name.split("/")[1] for name in metrics if name.endswith("/low")}
    scores = {name for name in scores if not name.endswith("_like_length")}
    own = set() if loss in ("dpo", "ipo") else {"implicit_reward"}
    assert scores == {"dpo_reward"} | BASELINES | own
    assert metrics["test/dpo_reward/accuracy"] == 0.5  # untrained: the policy is the reference
    # Untrained, SimPO ranks as the reference does, R-DPO by length, and TDPO not at all.
    equal_to = {"simpo": "reference_logprob_per_token", "rdpo": "longer_answer", "tdpo1": "dpo_reward"}
    if loss in equal_to:
        assert metrics["test/implicit_reward/accuracy"] == metrics[f"test/{equal_to[loss]}/accuracy"]


@pytest.mark.parametrize("loss", LOSSES)
def test_role_says_what_it_was_trained_with(tiny_model, files, tmp_path, loss):
    module = stages.dpo(tiny_model, loss=loss, options=OWN_OPTIONS[loss])
    module.configure_model()
    module.save_role(tmp_path / "role")
    card = RoleCard.read(tmp_path / "role")
    assert card.role == "dpo"
    assert card.settings == {"loss": loss, "beta": 2.5 if loss == "simpo" else 0.1, **OWN_OPTIONS[loss]}


@pytest.mark.parametrize("loss", ["rdpo", "simpo", "tdpo2"])
def test_rto_takes_token_rewards_from_a_role_of_any_loss(tiny_model, files, tmp_path, loss):
    """Also of SimPO, whose training read no reference: the reward is against what its policy started from."""
    sft = stages.fit(stages.sft(tiny_model), stages.demonstrations(files), tmp_path, steps=3)
    sft.save_role(tmp_path / "sft")
    init = {"init": str(tmp_path / "sft")}
    module = stages.fit(stages.dpo(tiny_model, loss=loss, **init), stages.preferences(files), tmp_path, steps=3)
    module.save_role(tmp_path / "dpo")
    assert RoleCard.read(tmp_path / "dpo").init_fingerprint == adapter_fingerprint(tmp_path / "sft")
    rewards = RewardSettings(beta_1=0.1, normalization_samples=8)

    rto = stages.rto(tiny_model, dpo=str(tmp_path / "dpo"), rewards=rewards, backbone=init)
    rto.configure_model()
    sequences = some_sequences()
    with torch.no_grad():
        trained, _ = module.backbone.token_logprobs("policy", sequences)
        carried, _ = rto.backbone.token_logprobs("dpo", sequences)
        reference, _ = rto.backbone.token_logprobs("reference", sequences)
        start, _ = sft.backbone.token_logprobs("policy", sequences)
    assert torch.equal(carried, trained) and torch.equal(reference, start)
    assert not torch.allclose(carried, reference, atol=1e-3)

    other = stages.rto(tiny_model, dpo=str(tmp_path / "dpo"), rewards=rewards)
    with pytest.raises(UserError, match="another reference"):
        other.configure_model()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "ipo", "label_smoothing": 0.2}, "label_smoothing belongs to loss dpo and does not go with loss ipo"),
        ({"loss": "dpo", "length_coefficient": 0.01}, "length_coefficient belongs to loss rdpo"),
        ({"loss": "tdpo2", "margin": 1.0}, "margin belongs to loss simpo .* leave it at 0.5"),
        ({"loss": "tdpo1", "kl_coefficient": 0.5}, "kl_coefficient belongs to loss tdpo2"),
        ({"loss": "dpo", "label_smoothing": 0.5}, "label_smoothing is 0.5"),
        ({"loss": "dpo", "label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ({"loss": "rdpo", "length_coefficient": -0.001}, "length_coefficient is -0.001"),
        ({"loss": "simpo", "margin": math.inf}, "margin is inf"),
        ({"loss": "tdpo2", "kl_coefficient": math.nan}, "kl_coefficient is nan"),
        ({"loss": "simpo", "beta": 0.0}, "beta is 0.0"),
        ({"loss": "dpo", "beta": math.inf}, "beta is inf"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tiny_model, options, message):
    with pytest.raises(UserError, match=message):
        PreferenceModule(stages.settings(tiny_model), **options)


def test_settings_of_other_losses_may_stand_at_their_defaults(tiny_model):
    """As they do in a configuration that lists every key, and in the one that a run writes down."""
    options = {"label_smoothing": 0.0, "length_coefficient": 0.001, "margin": 0.5, "kl_coefficient": 0.2}
    for loss in LOSSES:
        PreferenceModule(stages.settings(tiny_model), loss=loss, **options)
