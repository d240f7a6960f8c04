"""Where a run stands in the checkpoints that `SaveCheckpoints` writes, with a stage of two weights."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from rto_lightning.callbacks import SaveCheckpoints
from rto_lightning.errors import UserError
from rto_lightning.runs.checkpoint_files import WholeCheckpointIO, steps_of
from rto_lightning.runs.folder import checkpoint_to_resume, last_checkpoint
from tests.cli.stub_stage import StubBackboneSettings, StubData, StubStage


def run(folder, steps, resume=None, **settings):
    every = SaveCheckpoints(every_minutes=None, every_n_train_steps=1, keep=20)
    options = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    logger = CSVLogger(folder, name="", version=f"from_{steps}" if resume else "whole")
    trainer = Trainer(default_root_dir=folder, callbacks=[every], max_steps=steps, logger=logger, **options, **settings)
    trainer.fit(StubStage(StubBackboneSettings()), StubData(), ckpt_path=resume)
    return trainer


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"val_check_interval": 2},
        {"val_check_interval": 3, "check_val_every_n_epoch": None},
        {"accumulate_grad_batches": 3},
        {"limit_train_batches": 2},
    ],
    ids=str,
)
def test_from_every_checkpoint_a_run_ends_in_the_same_place(tmp_path, settings):
    """Counters of the loops, and weights, are those of the whole run; epochs have four batches."""
    whole = run(tmp_path, 7, **settings)
    end = torch.load(tmp_path / "checkpoints/step=7.ckpt", weights_only=True)
    for step in range(7):
        path = tmp_path / f"checkpoints/step={step}.ckpt"
        assert steps_of(path) == step
        again = run(tmp_path / f"again{step}", 7, path, **settings)
        now = torch.load(tmp_path / f"again{step}/checkpoints/step=7.ckpt", weights_only=True)
        assert now["loops"] == end["loops"], step
        assert now["batches_that_stepped"] == end["batches_that_stepped"]
        assert again.current_epoch == whole.current_epoch
        for name, weight in end["state_dict"].items():
            assert torch.equal(now["state_dict"][name], weight)


def test_old_checkpoints_go_and_the_link_follows(tmp_path):
    trainer = Trainer(
        default_root_dir=tmp_path,
        callbacks=[SaveCheckpoints(None, 1, keep=2)],
        max_steps=3,
        logger=False,
        enable_progress_bar=False,
    )
    trainer.fit(StubStage(StubBackboneSettings()), StubData())
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step=2.ckpt", "step=3.ckpt", "last.ckpt"}
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoints/step=3.ckpt"
    (tmp_path / "checkpoints/last.ckpt").unlink()
    assert checkpoint_to_resume(tmp_path) == tmp_path / "checkpoints/step=3.ckpt"


@pytest.mark.parametrize("settings", [{"every_minutes": 0}, {"every_n_train_steps": -1}, {"keep": 0}], ids=str)
def test_settings_that_no_run_can_use(settings):
    with pytest.raises(UserError, match=f"SaveCheckpoints.{next(iter(settings))} is "):
        SaveCheckpoints(**settings)


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", None], ids=["empty", "text", "tensor"])
def test_files_that_are_no_checkpoints(tmp_path, content):
    path = tmp_path / "step=1.ckpt"
    if content is None:
        torch.save(torch.zeros(3), path)
    else:
        path.write_bytes(content)
    for read in (steps_of, WholeCheckpointIO().load_checkpoint):
        with pytest.raises(UserError, match=r"the checkpoint .*step=1.ckpt (cannot be read|holds no state)"):
            read(path)
