"""Where a run stands in the checkpoints that `SaveCheckpoints` writes, with a stage of two weights."""

import time

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger

from rto_lightning.callbacks import SaveCheckpoints
from rto_lightning.errors import UserError
from rto_lightning.runs.checkpoint_files import WholeCheckpointIO, progress_of
from rto_lightning.runs.folder import checkpoint_to_resume, last_checkpoint
from rto_lightning.runs.limits import limits_of, limits_of_settings
from tests.cli.stub_stage import StubBackboneSettings, StubData, StubStage


def run(folder, steps, resume=None, **settings):
    every = SaveCheckpoints(every_minutes=None, every_n_train_steps=1, keep=20)
    options = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    logger = CSVLogger(folder, name="", version=f"from_{steps}" if resume else "whole")
    callbacks = [every, *settings.pop("callbacks", [])]
    trainer = Trainer(
        default_root_dir=folder, callbacks=callbacks, max_steps=steps, logger=logger, **options, **settings
    )
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
        assert progress_of(path).steps == step
        again = run(tmp_path / f"again{step}", 7, path, **settings)
        now = torch.load(tmp_path / f"again{step}/checkpoints/step=7.ckpt", weights_only=True)
        assert now["loops"] == end["loops"], step
        assert now["batches_that_stepped"] == end["batches_that_stepped"]
        assert again.current_epoch == whole.current_epoch
        for name, weight in end["state_dict"].items():
            assert torch.equal(now["state_dict"][name], weight)


def test_a_run_that_a_callback_has_ended_stays_ended_unless_it_is_made_longer(tmp_path):
    class StopAfterThree(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 3

    run(tmp_path, 7, callbacks=[StopAfterThree()])
    last = last_checkpoint(tmp_path)
    assert last.name == "step=3.ckpt" and progress_of(last).has_reached([7, -1, None])
    assert run(tmp_path / "again", 7, last).global_step == 3
    assert not progress_of(last).has_reached([8, -1, None])
    assert not progress_of(last).has_reached([7, 5, None])
    assert run(tmp_path / "longer", 8, last).global_step == 8


def test_a_run_that_its_time_has_ended_goes_on_with_more_of_it(tmp_path):
    class TakesLonger(Callback):
        def on_train_batch_start(self, *_):
            time.sleep(1.1)

    run(tmp_path, 7, max_time={"seconds": 1}, callbacks=[TakesLonger()])
    last = last_checkpoint(tmp_path)
    ended = progress_of(last)
    assert ended.steps == 1 and ended.has_reached(limits_of_settings(7, None, "00:00:00:01"))
    assert not ended.has_reached(limits_of_settings(7, None, "00:01:00:00"))
    assert run(tmp_path / "again", 7, last, max_time={"seconds": 1}).global_step == 1
    assert run(tmp_path / "longer", 7, last, max_time={"hours": 1}).global_step == 7


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_steps": 5}, {"max_epochs": 3}, {"max_time": "01:00:00:02"}, {"max_steps": 5, "max_epochs": 1}],
    ids=str,
)
def test_limits_are_those_that_lightning_makes_of_the_settings(tmp_path, settings):
    found = []

    class Limits(Callback):
        def on_train_start(self, trainer, pl_module):
            found.append(limits_of(trainer))
            trainer.should_stop = True

    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(default_root_dir=tmp_path, callbacks=[Limits()], logger=False, **quiet, **settings)
    trainer.fit(StubStage(StubBackboneSettings()), StubData())
    asked = {"max_steps": -1, "max_epochs": None, "max_time": None} | settings
    assert found == [limits_of_settings(**asked)]


def test_a_run_that_ends_while_gradients_are_accumulated_saves_no_half_step(tmp_path):
    class StopAtSix(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = trainer.fit_loop.total_batch_idx == 5

    run(tmp_path, 7, accumulate_grad_batches=4, val_check_interval=1, callbacks=[StopAtSix()])
    assert last_checkpoint(tmp_path).name == "step=1.ckpt"


def test_checkpoints_of_others_are_left_alone(tmp_path):
    run(tmp_path, 2)
    others = [tmp_path / "checkpoints" / name for name in ("step=1-best.ckpt", "epoch=0.ckpt")]
    for path in others:
        path.touch()
    (tmp_path / "checkpoints/step=9.ckpt.partial").touch()
    start = tmp_path / "checkpoints/step=1.ckpt"
    Trainer(
        default_root_dir=tmp_path,
        callbacks=[SaveCheckpoints(None, 1)],
        max_steps=3,
        logger=False,
        enable_progress_bar=False,
    ).fit(StubStage(StubBackboneSettings()), StubData(), ckpt_path=start)
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {"step=3.ckpt", "last.ckpt", *(path.name for path in others)}


def test_a_trial_run_leaves_a_folder_as_it_is(tmp_path):
    run(tmp_path, 2)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    Trainer(default_root_dir=tmp_path, callbacks=[SaveCheckpoints()], fast_dev_run=1, enable_progress_bar=False).fit(
        StubStage(StubBackboneSettings()), StubData()
    )
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_one_callback_serves_two_runs(tmp_path):
    every = SaveCheckpoints(None, 1)
    for name in ("one", "two"):
        Trainer(
            default_root_dir=tmp_path / name, callbacks=[every], max_steps=2, logger=False, enable_progress_bar=False
        ).fit(StubStage(StubBackboneSettings()), StubData())
        assert last_checkpoint(tmp_path / name).name == "step=2.ckpt"
    assert len(list(tmp_path.rglob("step=*.ckpt"))) == 2


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
    for read in (progress_of, WholeCheckpointIO().load_checkpoint):
        with pytest.raises(UserError, match=r"the checkpoint .*step=1.ckpt (cannot be read|holds no state)"):
            read(path)
