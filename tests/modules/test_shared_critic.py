"""A critic that is a head on the policy's hidden states."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from rto_lightning.algorithms import policy_loss, value_loss
from rto_lightning.backbone import BackboneSettings
from rto_lightning.modules.ppo_gradients import accumulate_policy_gradients
from rto_lightning.modules.reading import reads_while_sampling
from rto_lightning.modules.rto_settings import CriticSettings, PPOSettings
from tests.models import randomize
from tests.modules import stages

FLOAT64 = {"dtype": "float64"}
SHARED = CriticSettings(shared=True, value_coefficient=0.3)


def _module(model, **options):
    module = stages.rto(model, backbone=FLOAT64, critic=SHARED, **options)
    module.configure_model()
    for role in ("policy", "critic"):
        randomize(module.backbone.trained_parameters(role))
    return module


@pytest.mark.parametrize("mode", ["adapters", "full"])
def test_it_is_nothing_but_a_head(tiny_model, mode):
    module = stages.rto(tiny_model, backbone={"mode": mode}, critic=SHARED)
    module.configure_model()
    head = module.backbone.head("critic")
    assert module.backbone.trained_parameters("critic") == list(head.parameters())
    assert not set(map(id, head.parameters())) & set(map(id, module.backbone.trained_parameters("policy")))
    assert "critic" not in module.backbone.models
    assert mode == "full" or "critic" not in module.backbone.adapters.names


@pytest.mark.parametrize("microbatch_size", [1, 2, 100])
def test_one_backward_gives_the_gradient_of_both_losses(tiny_model, files, microbatch_size):
    module = _module(tiny_model, ppo=PPOSettings(microbatch_size=microbatch_size))
    experience = stages.experience(module, files)
    backbone, rows, mask = module.backbone, torch.tensor([3, 0, 1]), experience.mask[[3, 0, 1]]
    trained = [*backbone.trained_parameters("policy"), *backbone.trained_parameters("critic")]
    sequences = experience.trajectory.sequences.rows(rows)
    logprobs, _ = backbone.token_logprobs("policy", sequences)
    values = backbone.token_values("critic", sequences)
    of_policy, _ = policy_loss(logprobs, experience.logprobs[rows], experience.advantages[rows], mask, 0.2)
    of_values, _ = value_loss(values, experience.values[rows], experience.returns[rows], mask, 0.2)
    policy_weights = len(backbone.trained_parameters("policy"))
    weighted = torch.autograd.grad(of_policy + 0.3 * of_values, trained[:policy_weights], retain_graph=True)
    expected = [*weighted, *torch.autograd.grad(of_values, trained[policy_weights:])]

    forwards = []
    hook = backbone.models["base"].get_decoder().register_forward_hook(lambda *_: forwards.append(1))
    metrics = accumulate_policy_gradients(backbone, experience, rows, module.ppo, 1.0, torch.Tensor.backward, 0.3)
    hook.remove()

    assert len(forwards) == -(-3 // microbatch_size)
    assert float(metrics["policy/loss"]) == pytest.approx(float(of_policy), abs=1e-6)  # logged in float32
    assert float(metrics["critic/loss"]) == pytest.approx(float(of_values), abs=1e-6)
    for parameter, gradient in zip(trained, expected, strict=True):
        assert gradient.abs().sum() > 0
        # Three forwards against one: transformers' RMSNorm computes in float32.
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-6)


def test_while_the_critic_warms_up_the_policy_stays(tiny_model, files, tmp_path):
    module = stages.rto(tiny_model, critic=CriticSettings(shared=True, warmup_iterations=2))
    module.configure_model()
    before = {role: [p.clone() for p in module.backbone.trained_parameters(role)] for role in ("policy", "critic")}
    metrics = stages.recorded_fit(module, files, tmp_path, steps=2)
    assert all(
        torch.equal(a, b) for a, b in zip(before["policy"], module.backbone.trained_parameters("policy"), strict=True)
    )
    assert not torch.equal(before["critic"][0], module.backbone.trained_parameters("critic")[0])
    assert "train/policy/loss" not in metrics[0] and metrics[0]["train/critic/loss"] > 0


def test_a_policy_that_stops_early_leaves_the_critic_its_updates(tiny_model, files, tmp_path):
    ppo = PPOSettings(epochs=2, minibatch_size=2, microbatch_size=2, kl_stop=1e-9)
    module = stages.rto(tiny_model, critic=SHARED, ppo=ppo)
    metrics = stages.recorded_fit(module, files, tmp_path, steps=2)
    assert metrics[0]["train/policy/optimizer_steps"] == 1  # the ratio is 1 at the first, and no longer at the second
    assert all(step["train/critic/loss"] > 0 and step["train/critic/gradient_norm"] > 0 for step in metrics)


@pytest.mark.parametrize("kept", [False, True])
def test_values_are_read_with_the_policy(tiny_model, files, kept):
    """Off the sampling forwards, or in the one pass that reads the policy's log-probabilities."""
    module = _module(tiny_model, ppo=PPOSettings(sampling_logprobs=kept))
    batch = stages.one_batch(module, files)
    module.measure_score_statistics([batch])
    trajectory = module.rollout(batch, 0)
    assert (trajectory.logprobs is not None) == (trajectory.values is not None) == kept
    forwards = []
    hook = module.backbone.models["base"].get_decoder().register_forward_hook(lambda *_: forwards.append(1))
    experience = module.make_experience(trajectory, batch.messages)
    hook.remove()
    assert len(forwards) == (1 if kept else 2)  # the reference, and the policy
    with torch.no_grad():
        expected = module.backbone.token_logprobs_and_values("policy", "critic", trajectory.sequences, 1.0, True)
    assert expected[2].abs().sum() > 0
    for found, wanted in zip((experience.logprobs, experience.entropy, experience.values), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def test_it_goes_on_from_a_checkpoint(tiny_model, files, tmp_path):
    def run(folder, steps, **options):
        torch.manual_seed(0)
        module = stages.rto(tiny_model, critic=SHARED, seed=1)
        checkpoints = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        trainer = stages.trainer(folder, steps, enable_checkpointing=True, callbacks=[checkpoints])
        trainer.fit(module, stages.prompts(files), **options)
        return [p.detach() for role in ("policy", "critic") for p in module.backbone.trained_parameters(role)]

    whole = run(tmp_path / "whole", 3)
    run(tmp_path / "first", 2)
    resumed = run(tmp_path / "second", 3, ckpt_path=tmp_path / "first" / "step=2.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


@pytest.mark.parametrize(
    ("dtype", "quantization", "precision", "exact"),
    [
        ("float32", None, "32-true", True),
        ("float64", None, "64-true", True),
        ("bfloat16", None, "32-true", False),
        ("float32", "nf4", "32-true", False),
        ("float32", None, "bf16-mixed", False),
    ],
)
def test_only_32_bits_sample_exactly(dtype, quantization, precision, exact):
    backbone = BackboneSettings("model", dtype=dtype, quantization=quantization)
    assert reads_while_sampling(None, backbone, precision) == exact
    assert reads_while_sampling(True, backbone, precision) and not reads_while_sampling(False, backbone, precision)


def test_shortened_products_do_not_sample_exactly():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert not reads_while_sampling(None, BackboneSettings("model", dtype="float32"), "32-true")
        assert reads_while_sampling(None, BackboneSettings("model", dtype="float64"), "64-true")
    finally:
        torch.set_float32_matmul_precision(before)


def test_only_the_role_that_sampled_takes_its_log_probabilities_from_there(tiny_model, files):
    module = _module(tiny_model)
    batch = stages.one_batch(module, files)
    module.measure_score_statistics([batch])
    trajectory = module.rollout(batch, 0, role="reference")
    assert trajectory.role == "reference" and trajectory.logprobs is not None
    with torch.no_grad():
        expected, _ = module.backbone.token_logprobs("policy", trajectory.sequences)
    found = module.reward(trajectory, batch.messages).logprobs
    assert (found - trajectory.logprobs).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
