from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from rto_lightning.callbacks import SaveRole
from tests.cli.stub_stage import StubBackboneSettings, StubData, StubStage


def fit(module: LightningModule, root: Path, **settings) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[SaveRole(root / "role")],
        default_root_dir=root,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
        **{"max_steps": 3, **settings},
    )
    trainer.fit(module, datamodule=StubData())
    return trainer


def test_the_trained_role_is_saved(tmp_path):
    module = StubStage(StubBackboneSettings(model="m"))
    before = module.layer.weight.clone()
    fit(module, tmp_path)
    saved = (tmp_path / "role" / "role.json").read_text()
    assert not torch.equal(before, module.layer.weight)
    assert str(module.layer.weight[0, 0].item())[:8] in saved
    assert [path.name for path in tmp_path.iterdir()] == ["role"]


def test_an_exception_leaves_no_role(tmp_path):
    with pytest.raises(RuntimeError, match="the power went out"):
        fit(StubStage(StubBackboneSettings(), interrupt_at=1), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_half_written_role_is_replaced(tmp_path):
    (tmp_path / "role.partial").mkdir()
    (tmp_path / "role.partial" / "old").touch()
    fit(StubStage(StubBackboneSettings()), tmp_path)
    assert [path.name for path in (tmp_path / "role").iterdir()] == ["role.json"]


def test_a_failure_while_saving_leaves_no_role(tmp_path):
    class Failing(StubStage):
        def save_role(self, path: Path) -> None:
            path.mkdir()
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fit(Failing(StubBackboneSettings()), tmp_path)
    assert not (tmp_path / "role").exists()


def test_no_step_no_role(tmp_path):
    with pytest.warns(UserWarning, match="no role is saved"):
        fit(StubStage(StubBackboneSettings()), tmp_path, max_steps=0)
    assert not (tmp_path / "role").exists()
