"""The moving average of the policy: what is validated, saved and resumed."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from rto_lightning.backbone import PolicyBackbone
from rto_lightning.errors import UserError
from tests.modules import stages


class Snapshots(Callback):
    """Keeps the policy's weights after each iteration."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, module, *args):
        self.weights.append([p.detach().clone() for p in module.backbone.trained_parameters("policy")])


@pytest.mark.parametrize("mode", ["adapters", "full"])
def test_moving_average_is_what_is_saved(tiny_model, files, tmp_path, mode):
    module = stages.rto(tiny_model, ema_decay=0.8, backbone={"mode": mode})
    module.configure_model()
    expected = [p.detach().clone() for p in module.backbone.trained_parameters("policy")]
    snapshots = Snapshots()
    stages.fit(module, stages.prompts(files), tmp_path, steps=3, callbacks=[snapshots])
    for weights in snapshots.weights:
        expected = [0.8 * average + 0.2 * weight for average, weight in zip(expected, weights, strict=True)]
    average = module.backbone.trained_parameters("policy_average")
    for a, b in zip(average, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(a, b) for a, b in zip(average, snapshots.weights[-1], strict=True))
    module.save_role(tmp_path / "role")
    loaded = loaded_policy(tiny_model, tmp_path / "role", mode)
    assert all(torch.equal(a, b) for a, b in zip(average, loaded, strict=True))


def loaded_policy(model, folder, mode):
    settings = stages.settings(model, mode=mode)
    backbone = PolicyBackbone(settings, stages.rto(model).chat)
    backbone.add_role("policy", str(folder), trainable=True)
    return backbone.trained_parameters("policy")


def test_moving_average_is_what_is_validated_and_goes_on_from_a_checkpoint(tiny_model, files, tmp_path):
    torch.manual_seed(0)
    whole = stages.fit(stages.rto(tiny_model, seed=1, ema_decay=0.5), stages.prompts(files), tmp_path, steps=4)
    torch.manual_seed(0)
    checkpoints = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    options = {"enable_checkpointing": True, "callbacks": [checkpoints]}
    stages.fit(stages.rto(tiny_model, seed=1, ema_decay=0.5), stages.prompts(files), tmp_path, 3, **options)
    resumed = stages.rto(tiny_model, seed=1, ema_decay=0.5)
    stages.trainer(tmp_path, 4).fit(resumed, stages.prompts(files), ckpt_path=tmp_path / "step=2.ckpt")
    for role in ("policy", "policy_average"):
        pairs = zip(whole.backbone.trained_parameters(role), resumed.backbone.trained_parameters(role), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), role
    data = stages.prompts(files)
    [averaged] = stages.trainer(tmp_path, 0).validate(resumed, data, verbose=False)
    fresh = stages.rto(tiny_model, seed=1, ema_decay=0.5)
    checkpoint = tmp_path / "average.ckpt"
    resumed.trainer.save_checkpoint(checkpoint)
    [again] = stages.trainer(tmp_path, 0).validate(fresh, data, ckpt_path=checkpoint, verbose=False)
    answers = stages.trainer(tmp_path, 0).predict(resumed, data)
    resumed.save_role(tmp_path / "role")
    saved = stages.rto(tiny_model, seed=1, trained=str(tmp_path / "role"))
    [of_role] = stages.trainer(tmp_path, 0).validate(saved, data, verbose=False)
    assert averaged == again == of_role
    assert answers == stages.trainer(tmp_path, 0).predict(saved, data)
    plain = stages.rto(tiny_model, seed=1)
    [last] = stages.trainer(tmp_path, 0).validate(plain, data, ckpt_path=checkpoint, verbose=False)
    assert last != averaged
    with pytest.raises(UserError, match="holds no moving average"):
        resumed = stages.rto(tiny_model, seed=1, ema_decay=0.5)
        stages.fit(plain, data, tmp_path, 1, enable_checkpointing=True, callbacks=[checkpoints_every_step(tmp_path)])
        stages.trainer(tmp_path, 2).fit(resumed, data, ckpt_path=tmp_path / "plain-step=1.ckpt")


def checkpoints_every_step(folder):
    return ModelCheckpoint(folder, filename="plain-{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.mark.parametrize("decay", [0.0, 1.0, 2.0])
def test_a_decay_out_of_range_is_refused(tiny_model, decay):
    with pytest.raises(UserError, match="set it between 0 and 1"):
        stages.rto(tiny_model, ema_decay=decay)
