"""Optimizers under Lightning: checkpoints, clipping, and what is refused before the model is loaded."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from lightning.pytorch.callbacks import ModelCheckpoint

from rto_lightning.errors import UserError
from rto_lightning.modules import StageModule
from tests.modules import stages

EIGHT_BITS = partial(AdamW8bit, lr=1e-2, min_8bit_size=1)
"""The tiny model's adapters are below the size from which moments have 8 bits."""


def dpo(model: Path, optimizer: Any) -> StageModule:
    module = stages.dpo(model)
    module.optimizer = optimizer
    return module


def rto(model: Path, optimizer: Any) -> StageModule:
    return stages.rto(model, seed=1, policy_optimizer=optimizer, critic_optimizer=optimizer)


def weights(module: StageModule) -> list[torch.Tensor]:
    return [w.detach().clone() for role in module.backbone.roles for w in module.backbone.trained_parameters(role)]


def moments(trainer: Any) -> list[torch.Tensor]:
    states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
    return [state[name] for state in states for name in ("state1", "state2")]


@pytest.mark.parametrize(("make", "data"), [(dpo, stages.preferences), (rto, stages.prompts)])
def test_8_bit_moments_go_through_a_checkpoint(make, data, tiny_model, files, tmp_path) -> None:
    torch.manual_seed(0)
    whole = make(tiny_model, EIGHT_BITS)
    first = stages.trainer(tmp_path / "whole", 4)
    first.fit(whole, data(files))
    assert moments(first) and all(moment.dtype == torch.uint8 for moment in moments(first))

    torch.manual_seed(0)
    checkpoint = ModelCheckpoint(tmp_path, filename="half", every_n_train_steps=2)
    halved = make(tiny_model, EIGHT_BITS)
    stages.trainer(tmp_path, 2, enable_checkpointing=True, callbacks=[checkpoint]).fit(halved, data(files))
    resumed = make(tiny_model, EIGHT_BITS)
    second = stages.trainer(tmp_path / "rest", 4)
    second.fit(resumed, data(files), ckpt_path=tmp_path / "half.ckpt")
    assert second.global_step == 4
    for one, other in ((weights(whole), weights(resumed)), (moments(first), moments(second))):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(halved), weights(resumed), strict=True))


def test_a_resumed_run_needs_the_moments(tiny_model, files, tmp_path) -> None:
    torch.manual_seed(0)
    checkpoint = ModelCheckpoint(tmp_path, filename="half", every_n_train_steps=2)
    options: dict[str, Any] = {"enable_checkpointing": True, "callbacks": [checkpoint]}
    stages.trainer(tmp_path, 2, **options).fit(dpo(tiny_model, EIGHT_BITS), stages.preferences(files))
    content = torch.load(tmp_path / "half.ckpt", weights_only=True)
    ended = []
    for forget in (False, True):
        if forget:
            content["optimizer_states"][0]["state"] = {}
        torch.save(content, tmp_path / "changed.ckpt")
        module = dpo(tiny_model, EIGHT_BITS)
        trainer = stages.trainer(tmp_path, 4)
        trainer.fit(module, stages.preferences(files), ckpt_path=tmp_path / "changed.ckpt")
        ended.append(weights(module))
    assert not any(torch.equal(a, b) for a, b in zip(*ended, strict=True))


def test_gradients_of_a_fused_optimizer_are_clipped(tiny_model, files, tmp_path) -> None:
    ended = []
    for fused in (False, True):
        torch.manual_seed(0)
        module = dpo(tiny_model, partial(torch.optim.AdamW, lr=1e-2, eps=1.0, fused=fused))  # eps: the norm matters
        trainer = stages.trainer(tmp_path, 3, precision="bf16-mixed", gradient_clip_val=1e-2)
        trainer.fit(module, stages.preferences(files))
        assert trainer.optimizers[0].defaults["fused"] is fused
        ended.append(torch.cat([weight.flatten() for weight in weights(module)]))
    torch.testing.assert_close(*ended, rtol=1e-5, atol=1e-7)


class NeedsAnotherDevice(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        raise NotImplementedError("no kernel for this device")


@pytest.mark.parametrize(
    ("module", "data", "key"),
    [
        (lambda model: dpo(model, NeedsAnotherDevice), stages.preferences, "model.optimizer"),
        (lambda model: rto(model, NeedsAnotherDevice), stages.prompts, "model.policy_optimizer"),
        (
            lambda model: stages.rto(model, critic_optimizer=NeedsAnotherDevice),
            stages.prompts,
            "model.critic_optimizer",
        ),
    ],
)
def test_it_is_refused_before_the_model_is_loaded(module, data, key, tiny_model, files, tmp_path, monkeypatch) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(StageModule, "configure_model", lambda self: loaded.append("model"))
    with pytest.raises(UserError, match=f"^{key}: "):
        stages.trainer(tmp_path, 1).fit(module(tiny_model), data(files))
    assert not loaded


def test_testing_asks_for_no_optimizer(tiny_model, files, tmp_path) -> None:
    [metrics] = stages.trainer(tmp_path, 1).test(dpo(tiny_model, NeedsAnotherDevice), stages.preferences(files))
    assert metrics["test/loss"] > 0
