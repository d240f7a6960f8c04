"""Runs that go on, and folders that have a run already."""

import shutil
from pathlib import Path

import pytest

from rto_lightning.cli import main
from tests.cli.stub_runs import fails, losses, stage, write

pytestmark = pytest.mark.usefixtures("stub_stages")


EVERY_TWO_STEPS = {"class_path": "SaveCheckpoints", "init_args": {"every_n_train_steps": 2}}


@pytest.fixture
def interrupted(capsys):
    """The folder of a run that died in its sixth step."""
    settings = {"max_steps": 8, "callbacks": [EVERY_TWO_STEPS], "enable_progress_bar": False}
    changes = {f"trainer__{key}": value for key, value in settings.items()}
    write("s.yaml", stage(trainer__default_root_dir="out", **changes))
    with pytest.raises(RuntimeError, match="the power went out"):
        main(["fit", "--config", "s.yaml", "--model.interrupt_at=5"])
    assert not Path("out/role").exists()
    # The run that goes on is the same one, but for the accident.
    Path("out/config.yaml").write_text(
        Path("out/config.yaml").read_text().replace("interrupt_at: 5", "interrupt_at: null")
    )
    return Path("out")


def test_a_run_goes_on_from_its_last_checkpoint(interrupted, capsys):
    before, config = losses(interrupted / "metrics/fit/metrics.csv"), (interrupted / "config.yaml").read_text()
    assert main(["fit", "--config", "s.yaml", "--ckpt_path", "last"]) == 0
    assert "Going on from out/checkpoints/step=4.ckpt, at step 4." in capsys.readouterr().out
    after = losses(interrupted / "metrics/fit/metrics.csv")
    assert len(before) == 5 and len(after) == 8 and after[:5] == before
    assert [path.name for path in (interrupted / "metrics").iterdir()] == ["fit"]
    assert {path.name for path in (interrupted / "checkpoints").iterdir()} == {"step=8.ckpt", "last.ckpt"}
    assert (interrupted / "config.yaml").read_text() == config and not (interrupted / "config-2.yaml").exists()
    assert main(["fit", "--config", "s.yaml", "--ckpt_path", "last"]) == 0
    assert "out is finished: its role is out/role" in capsys.readouterr().out


def test_two_runs_are_not_mixed(interrupted, capsys):
    assert fails(capsys, "fit", "--config", "s.yaml") == (
        1,
        "out holds a run that is not finished; go on with it by --ckpt_path last, choose another "
        "--trainer.default_root_dir, or remove that folder.",
    )
    changed = ("--model.optimizer.lr=0.5", "--trainer.max_steps=9", "--trainer.log_every_n_steps=2")
    status, told = fails(capsys, "fit", "--config", "s.yaml", "--ckpt_path", "last", *changed)
    assert status == 1
    assert told.startswith("the run in out began with other settings (config.yaml: model.init_args.optimizer")
    assert "lr was 0.001 and is 0.5), with which it goes on" in told and told.count(" was ") == 1
    assert main(["fit", "--config", "s.yaml", "--ckpt_path", "last", *changed[1:]]) == 0


def test_another_run_may_go_on_from_a_checkpoint(interrupted):
    other = ("--trainer.default_root_dir=other", "--model.optimizer.lr=0.5", "--ckpt_path=out/checkpoints/last.ckpt")
    assert main(["fit", "--config", "s.yaml", *other]) == 0
    assert len(losses(Path("other/metrics/fit/metrics.csv"))) == 4
    assert {path.name for path in Path("other/checkpoints").iterdir()} == {"step=8.ckpt", "last.ckpt"}


def test_a_run_that_has_lost_its_checkpoints(interrupted, capsys):
    for path in (interrupted / "checkpoints").iterdir():
        path.unlink()
    assert fails(capsys, "fit", "--config", "s.yaml", "--ckpt_path", "last") == (
        1,
        "out holds a run that has begun, and out/checkpoints no checkpoint of it; name one by --ckpt_path FILE, or "
        "begin anew in another --trainer.default_root_dir.",
    )
    new = ("--trainer.default_root_dir=new", "--ckpt_path", "last")
    assert fails(capsys, "validate", "--config", "s.yaml", *new) == (
        1,
        "there is no checkpoint in new/checkpoints; name one after --ckpt_path.",
    )


def test_a_damaged_checkpoint(interrupted, capsys):
    path = (interrupted / "checkpoints/last.ckpt").resolve()
    path.write_bytes(path.read_bytes()[:500])
    status, told = fails(capsys, "fit", "--config", "s.yaml", "--ckpt_path", "last")
    assert status == 1 and told.startswith("the checkpoint out/checkpoints/step=4.ckpt cannot be read (")


def test_a_new_run_may_be_asked_to_go_on():
    write("s.yaml", stage(trainer__default_root_dir="out"))
    assert main(["fit", "--config", "s.yaml", "--ckpt_path", "last"]) == 0
    assert len(losses(Path("out/metrics/fit/metrics.csv"))) == 3


def test_a_finished_run_can_be_made_longer(capsys):
    write("s.yaml", stage(trainer__default_root_dir="out"))
    assert main(["fit", "--config", "s.yaml"]) == 0
    capsys.readouterr()
    longer = ("fit", "--config", "s.yaml", "--ckpt_path", "last", "--trainer.max_steps=6")
    assert "out/role exists already" in fails(capsys, *longer)[1]
    shutil.move("out/role", "shorter")
    assert main(list(longer)) == 0
    main(["fit", "--config", "s.yaml", "--trainer.max_steps=6", "--trainer.default_root_dir=at_once"])
    assert losses(Path("out/metrics/fit/metrics.csv")) == losses(Path("at_once/metrics/fit/metrics.csv"))


def test_a_trained_role_is_not_written_over(capsys):
    write("s.yaml", stage(trainer__default_root_dir="out", model__init_args__dpo="missing"))
    Path("out/role").mkdir(parents=True)
    assert fails(capsys, "fit", "--config", "s.yaml") == (
        1,
        "out/role exists already and is not written over; choose another --trainer.default_root_dir, "
        "or remove that folder.",
    )
    assert [path.name for path in Path("out").rglob("*")] == ["role"]
