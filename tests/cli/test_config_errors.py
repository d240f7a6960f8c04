"""Mistakes in settings, files and options, each told in one sentence."""

import re
from pathlib import Path

import pytest
import yaml

from rto_lightning.cli import main
from tests.cli.stub_runs import fails, stage, write

pytestmark = pytest.mark.usefixtures("stub_stages")


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
