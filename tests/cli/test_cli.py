import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rto_lightning import cli
from rto_lightning.cli import lightning_cli, main
from rto_lightning.cli.stage import given_config_files
from rto_lightning.errors import Stopped
from tests.cli.stub_stage import StubBase

STAGE = {
    "model": {"class_path": "tests.cli.stub_stage.StubStage", "init_args": {"backbone": {"model": "m"}}},
    "data": {"class_path": "tests.cli.stub_stage.StubData"},
    "trainer": {"max_steps": 3, "accelerator": "cpu", "enable_model_summary": False},
}


@pytest.fixture(autouse=True)
def stub_stages(monkeypatch, tmp_path):
    monkeypatch.setattr(lightning_cli, "stage_module_class", lambda: StubBase)
    monkeypatch.chdir(tmp_path)


def write(name: str, content: dict | str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return name


def stage(**changes) -> dict:
    """The stub stage's configuration with `a__b__c=value` set at a.b.c."""
    content = json.loads(json.dumps(STAGE))
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = content
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return content


def fails(capsys, *args: str) -> tuple[int, str]:
    """Runs the command and returns its status and its only line on stderr."""
    status = main(list(args))
    captured = capsys.readouterr()
    assert captured.err.startswith("rto-lightning: error: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    return status, captured.err.removeprefix("rto-lightning: error: ").strip()


def losses(path: Path) -> list[str]:
    """The training losses in a metrics.csv."""
    with path.open(newline="") as file:
        return [row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]]


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


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"model__init_args__backbone": {"modell": "m"}},
            "`model.init_args.backbone.modell`; did you mean `model`?",
        ),
        ({"model__init_args__lrr": 1}, "`model.init_args.lrr`; did you mean `lr`?"),
        (
            {"model__init_args__backbone": {"adapter": {"rnk": 1}}},
            "`model.init_args.backbone.adapter.rnk`; did you mean `rank`?",
        ),
        (
            {"model__init_args__backbone": {"second": {"rnk": 1}}},
            "`model.init_args.backbone.second.rnk`; did you mean `rank`?",
        ),
        (
            {"model__init_args__optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"weigth_decay": 1}}},
            "`model.init_args.optimizer.init_args.weigth_decay`; did you mean `weight_decay`?",
        ),
        ({"data__init_args": {"n": 1}}, "`data.init_args.n`; known there: batch_size, rows."),
        ({"trainer__max_stps": 1}, "`trainer.max_stps`; did you mean `max_steps`?"),
        ({"modell": {"class_path": "x"}}, "`modell`; did you mean `model`?"),
    ],
)
def test_an_unknown_key_is_named_with_file_and_line(capsys, changes, sentence):
    text = yaml.safe_dump(stage(**changes), sort_keys=False)
    key = re.findall(r"(\w+)`", sentence)[0]
    line = 1 + next(n for n, row in enumerate(text.splitlines()) if f"{key}:" in row)
    status, error = fails(capsys, "fit", "--config", write("s.yaml", text))
    assert (status, error) == (2, f"s.yaml line {line}: unknown key {sentence}")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model__init_args__lr": "abc"}, "`model.init_args.lr` must be a number, not abc."),
        (
            {"model__init_args__backbone": {"adapter": {"rank": 1.5}}},
            "`model.init_args.backbone.adapter.rank` must be a whole number, not 1.5.",
        ),
        (
            {"data__class_path": "tests.cli.stub_stage.StubNamedData"},
            "`data.init_args.train` is not set.",
        ),
        ({"trainer__max_steps": "many"}, "`trainer.max_steps` must be a whole number, not many."),
        (
            {"model__class_path": "tests.cli.stub_stage.StubStag"},
            "`model.class_path`: cannot import tests.cli.stub_stage.StubStag "
            "(module 'tests.cli.stub_stage' has no attribute 'StubStag').",
        ),
        (
            {"data__class_path": "nowhere.Data"},
            "`data.class_path`: cannot import nowhere.Data (No module named 'nowhere').",
        ),
        (
            {"model__class_path": "tests.cli.stub_stage.StubData"},
            "`model.class_path`: tests.cli.stub_stage.StubData is no StubBase.",
        ),
        (
            {"model__lr": 1},
            "`model` must be a mapping of `class_path` (a StubBase) and `init_args` and nothing else.",
        ),
        (
            {"model__init_args__backbone": "m"},
            "`model.init_args.backbone` must be a mapping of settings or the path of a YAML file.",
        ),
    ],
)
def test_a_wrong_value_is_named_with_file(capsys, changes, sentence):
    status, error = fails(capsys, "fit", "--config", write("s.yaml", stage(**changes)))
    assert status == 2
    assert re.sub(r" line \d+", "", error) == f"s.yaml: {sentence}"


def test_of_several_files_the_one_with_the_mistake_is_named(capsys):
    write("s.yaml", stage())
    write("overlay.yaml", "trainer:\n  max_stps: 1\n")
    _, error = fails(capsys, "fit", "--config", "s.yaml", "--config=overlay.yaml")
    assert error == "overlay.yaml line 2: unknown key `trainer.max_stps`; did you mean `max_steps`?"


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--model.lrr=1", "unknown key `model.lrr`; did you mean `lr`?"),
        ("--trainer.max_stps=1", "unknown key `trainer.max_stps`; did you mean `max_steps`?"),
        ("--model.lr=x", "`model.lr` must be a number, not x."),
        ("--trainer.accelerator=gpu", "the trainer refuses its settings: No supported gpu backend found."),
        (
            "--config=list.yaml",
            "list.yaml is a list of stages; `rto-lightning pipeline --config list.yaml` runs it, and other commands "
            "take the file of one stage.",
        ),
    ],
)
def test_mistakes_on_the_command_line(capsys, option, sentence):
    write("list.yaml", "stages: []\n")
    status, error = fails(capsys, "fit", "--config", write("s.yaml", stage()), option)
    assert error == sentence
    assert status == (1 if "trainer refuses" in sentence else 2)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "the configuration file s.yaml does not exist; check the path after --config."),
        ("a: 1\n b: 2\n", "s.yaml is not a YAML file: mapping values are not allowed here in line 2."),
        (
            "- a\n",
            "s.yaml holds no settings; a configuration is a YAML mapping such as `trainer: {...}`.",
        ),
        (
            "trainer: {max_steps: 1}\n",
            "s.yaml: `model` and `data` are not set; give `class_path` and `init_args`.",
        ),
    ],
)
def test_files_that_are_no_configurations(capsys, content, sentence):
    if content is not None:
        write("s.yaml", content)
    assert fails(capsys, "fit", "--config", "s.yaml") == (2, sentence)


def test_errors_of_the_modules_are_told_as_they_are(capsys):
    write("s.yaml", stage(model__init_args__backbone={"model": "bad"}))
    assert fails(capsys, "fit", "--config", "s.yaml") == (
        1,
        "model.backbone.model bad is no model; choose another.",
    )


def test_other_exceptions_keep_their_traceback():
    with pytest.raises(RuntimeError, match="the power went out"):
        main(["fit", "--config", write("s.yaml", stage(model__init_args__interrupt_at=1))])


def test_overlays_for_every_stage_and_those_beside_overlays_are_proposed(capsys):
    for folder in ("conf", "conf/small"):
        write(f"{folder}/dpo.yaml", stage())
    write("conf/rto.yaml", stage(model__init_args__dpo="outputs/dpo/role"))
    write("conf/small/rto.yaml", {"model": {"lr": 0.2}})
    write("conf/other.yaml", {"model": {"lr": 0.3}})
    write("precision/small.yaml", {"trainer": {"precision": "32-true"}, "model": {"backbone": {"model": "n"}}})
    write("method/fast.yaml", {"model": {"lr": 0.4}})
    names = ("conf/rto", "precision/small", "method/fast", "conf/small/rto", "conf/other")
    configs = [f"--config={name}.yaml" for name in names]
    assert fails(capsys, "fit", *configs) == (
        1,
        "the dpo role outputs/dpo/role does not exist; make it first with: rto-lightning fit "
        "--config conf/dpo.yaml --config precision/small.yaml --config conf/small/dpo.yaml",
    )


@pytest.mark.parametrize("beside", [True, False])
def test_a_missing_input_comes_with_the_command_that_makes_it(capsys, beside):
    write("conf/rto.yaml", stage(model__init_args__dpo="outputs/dpo/role"))
    if beside:
        write("conf/dpo.yaml", stage())
    config = "conf/dpo.yaml" if beside else "DPO_CONFIG.yaml"
    assert fails(capsys, "fit", "--config", "conf/rto.yaml") == (
        1,
        f"the dpo role outputs/dpo/role does not exist; make it first with: rto-lightning fit --config {config}",
    )
    assert not Path("outputs").exists()


@pytest.mark.parametrize("path", ["no.ckpt", "best"])  # a new process knows no best one
def test_a_missing_checkpoint(capsys, path):
    write("s.yaml", stage())
    assert fails(capsys, "validate", "--config", "s.yaml", "--ckpt_path", path) == (
        1,
        f"the checkpoint {path} does not exist; check the path after --ckpt_path.",
    )


def test_settings_that_the_trainer_refuses(capsys):
    status, error = fails(capsys, "fit", "--config", write("s.yaml", stage(trainer__accelerator="abacus")))
    assert status == 1
    assert error.startswith("the trainer refuses its settings: ")
    assert "abacus" in error


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
