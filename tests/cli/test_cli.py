"""What the command makes of a stage, and of words that are no stage."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rto_lightning import cli
from rto_lightning.cli import main
from rto_lightning.cli.stage import given_config_files
from rto_lightning.errors import Stopped
from tests.cli.stub_runs import fails, losses, stage, write

pytestmark = pytest.mark.usefixtures("stub_stages")


def test_fit_fills_the_folder_of_the_stage(capsys):
    assert main(["fit", "--config", write("s.yaml", stage()), "--trainer.default_root_dir", "out"]) == 0
    assert {path.name for path in Path("out").iterdir()} == {
        "checkpoints",
        "config.yaml",
        "memory.json",
        "metrics",
        "role",
        "tensorboard",
    }
    assert len(losses(Path("out/metrics/fit/metrics.csv"))) == 3
    assert list(Path("out/tensorboard/fit").glob("events*"))
    assert json.loads(Path("out/role/role.json").read_text())["model"] == "m"
    assert {path.name for path in Path(".").iterdir()} == {"out", "s.yaml"}
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "Tip" not in captured.out


def test_the_saved_configuration_repeats_the_run():
    main(["fit", "--config", write("s.yaml", stage()), "--model.lr=0.2", "--trainer.default_root_dir=out"])
    assert main(["fit", "--config", "out/config.yaml", "--trainer.default_root_dir=again"]) == 0
    assert Path("out/role/role.json").read_text() == Path("again/role/role.json").read_text()
    main(["fit", "--config", "s.yaml", "--trainer.default_root_dir=other"])
    assert Path("out/role/role.json").read_text() != Path("other/role/role.json").read_text()


def test_seed_one_is_the_default_and_another_seed_differs():
    write("s.yaml", stage())
    for name, extra in (("a", []), ("b", ["--seed_everything=1"]), ("c", ["--seed_everything=2"])):
        assert main(["fit", "--config", "s.yaml", f"--trainer.default_root_dir={name}", *extra]) == 0
    a, b, c = (Path(name, "role/role.json").read_text() for name in "abc")
    assert a == b != c


def test_later_configurations_override_earlier_ones():
    write("s.yaml", stage())
    write("overlay.yaml", {"model": {"init_args": {"backbone": {"model": "other"}}}, "trainer": {"max_steps": 1}})
    main(["fit", "--config", "s.yaml", "--config", "overlay.yaml", "--trainer.default_root_dir=out"])
    saved = yaml.safe_load(Path("out/config.yaml").read_text())
    assert saved["model"]["init_args"]["backbone"]["model"] == "other"
    assert saved["trainer"]["max_steps"] == 1
    assert saved["trainer"]["accelerator"] == "cpu"
    assert saved["seed_everything"] == 1


def test_the_folder_is_named_after_the_configuration_by_default():
    main(["fit", "--config", write("conf/tiny_sft.yaml", stage())])
    assert Path("outputs/tiny_sft/role").is_dir()


def test_validate_keeps_what_fit_wrote():
    write("s.yaml", stage(trainer__default_root_dir="out"))
    main(["fit", "--config", "s.yaml"])
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    for _ in range(2):
        assert main(["validate", "--config", "s.yaml"]) == 0
    assert all(path.read_bytes() == content for path, content in before.items())
    assert Path("out/metrics/validate/metrics.csv").exists()
    assert Path("out/metrics/validate-2/metrics.csv").exists()
    assert Path("out/config-validate.yaml").exists()


def test_loggers_and_checkpoints_of_the_user_stay():
    loggers = [{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "mine"}}]
    checkpoint = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": "kept", "save_last": True},
    }
    settings = stage(trainer__logger=loggers, trainer__callbacks=[checkpoint], trainer__default_root_dir="out")
    main(["fit", "--config", write("s.yaml", settings)])
    assert list(Path("mine").rglob("metrics.csv"))
    assert Path("kept/last.ckpt").exists()
    assert {path.name for path in Path("out").iterdir()} == {"checkpoints", "config.yaml", "memory.json", "role"}


def test_metrics_are_a_file_beside_another_logger():
    named = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "mine"}}
    main(["fit", "--config", write("s.yaml", stage(trainer__logger=named, trainer__default_root_dir="out"))])
    assert list(Path("mine").rglob("events.*")) and not Path("out/tensorboard").exists()
    assert Path("out/metrics/fit/metrics.csv").exists()


def test_an_unknown_command(capsys):
    status, error = fails(capsys, "fitt")
    assert status == 2
    assert "fit, validate, test, predict, plan, pipeline" in error


@pytest.mark.parametrize(
    ("args", "files"),
    [
        (["fit", "--config", "a.yaml", "--config=b.yaml", "-c", "c.yaml"], ["a.yaml", "b.yaml", "c.yaml"]),
        (["fit", "--model.config", "a.yaml", "--config"], []),
    ],
)
def test_given_config_files(args, files):
    assert given_config_files(args) == files


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["fit", "--config", "no.yaml"], ["pipeline", "--help"]])
def test_light_commands_do_not_import_torch(args):
    code = (
        "import sys\nfrom rto_lightning.cli import main\n"
        f"try:\n    main({args})\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'lightning', 'transformers') if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert result.stdout.splitlines()[-1] == "[]"


def test_the_package_runs_as_a_module(tmp_path):
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-m", "rto_lightning", "fit", "--config", "no.yaml"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert result.returncode == 2
    assert result.stderr == (
        "rto-lightning: error: the configuration file no.yaml does not exist; check the path after --config.\n"
    )


@pytest.mark.parametrize("given", [[], ["--ckpt_path", "other/step=9.ckpt"], ["--ckpt_path=other/step=9.ckpt"]])
def test_what_goes_on_is_the_run_that_a_signal_has_ended(monkeypatch, capsys, given):
    """Not another one, from whose checkpoint it has begun."""
    stopped = Stopped(signal.SIGTERM)
    stopped.saved, stopped.step = "run/checkpoints/step=3.ckpt", 3

    def stop(arguments):
        raise stopped

    monkeypatch.setattr(cli, "run_stage", stop)
    assert main(["fit", "--config", "a.yaml", *given, "--trainer.max_steps", "9"]) == 143
    told = capsys.readouterr().err
    assert told.endswith("go on with: rto-lightning fit --config a.yaml --trainer.max_steps 9 --ckpt_path last\n")


def test_ctrl_c_before_a_run_has_begun_is_told_in_a_sentence(monkeypatch, capsys):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_stage", interrupt)
    assert main(["fit", "--config", "a.yaml"]) == 130
    assert capsys.readouterr().err.startswith("rto-lightning: SIGINT ended the run outside of its steps; ")
