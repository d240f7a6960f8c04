"""Stages that run one after another, are skipped, go on, and are made again."""

import json
import math
from pathlib import Path

import pytest
import yaml

from rto_lightning.cli import main
from rto_lightning.cli.pipeline import StageResult, format_results
from tests.cli.stub_pipeline import COPY, FIT, SFT, WORLD, Size, calls, fails, pipeline, run
from tests.cli.stub_runs import write

pytestmark = pytest.mark.usefixtures("pipeline_folder")


def test_each_stage_gets_what_earlier_stages_made(capsys):
    pipeline(WORLD, SFT, COPY, seed=7)
    assert run() == 0
    out = Path("out").resolve()
    assert (out / "world/rows.txt").read_text() == "7\n8\n9\n10\n11"
    role = json.loads((out / "sft/role/role.json").read_text())
    assert role["model"] == f"{out}/world/rows.txt"
    assert json.loads((out / "copy/copied").read_text()) == role
    assert calls == [("world", 7, 5, 0.5, None), ("copy", f"{out}/sft/role/role.json", "{{ jinja }}")]
    settings = yaml.safe_load((out / "sft/config.yaml").read_text())
    assert settings["seed_everything"] == 7
    assert settings["model"]["init_args"]["lr"] == 0.2
    shown = capsys.readouterr().out
    assert f"[2/3] sft: fit conf/sft.yaml -> {out}/sft" in shown
    table = shown[shown.index("stage  seconds  state") :].splitlines()
    assert [line.split()[0] for line in table] == ["stage", "world", "sft", "copy", "now", "report:"]
    assert all(line.endswith("done now") for line in table[1:4])
    assert table[-1] == f"report: {out}/report.html"
    report = (out / "report.html").read_text(encoding="utf-8")
    for cell in ("world", "run tests.cli.stub_pipeline:make_world", "fit sft.yaml"):
        assert f"<td>{cell}</td>" in report


def test_what_is_done_is_skipped_and_left_alone(capsys):
    pipeline(WORLD, SFT, COPY)
    assert run() == 0
    before = {path: (path.stat().st_mtime_ns) for path in Path("out").rglob("*")}
    capsys.readouterr()
    assert run() == 0
    shown = capsys.readouterr().out
    for number, name in enumerate(("world", "sft", "copy"), start=1):
        assert f"[{number}/3] {name}: done before (" in shown
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")} == before
    assert len(calls) == 2


def test_files_overlay_each_other(capsys):
    write("conf/overlay.yaml", {"model": {"lr": 0.3}, "trainer": {"default_root_dir": "elsewhere"}})
    pipeline({"name": "sft", "fit": ["sft.yaml", "overlay.yaml"]})
    assert run() == 0
    settings = yaml.safe_load(Path("out/sft/config.yaml").read_text())
    assert settings["model"]["init_args"]["lr"] == 0.3
    assert "sft: fit conf/sft.yaml conf/overlay.yaml -> " in capsys.readouterr().out
    assert not Path("elsewhere").exists()  # a stage's folder is the pipeline's
    assert run() == 0
    write("conf/overlay.yaml", {"model": {"lr": 0.4}})
    capsys.readouterr()
    assert "sft (its configuration file has changed)" in fails(capsys)[1]


def test_an_overlay_is_put_on_every_stage_that_is_trained(capsys):
    write("overlay.yaml", {"model": {"lr": 0.3, "backbone": {"model": "other"}}})
    pipeline(
        WORLD,
        {"name": "first", "fit": "sft.yaml"},
        {"name": "second", "fit": "sft.yaml", "arguments": {"model.lr": 0.2}},
    )
    assert run("--overlay", "overlay.yaml") == 0
    for name, rate in (("first", 0.3), ("second", 0.2)):  # arguments of a stage win
        settings = yaml.safe_load(Path(f"out/{name}/config.yaml").read_text())["model"]["init_args"]
        assert (settings["backbone"]["model"], settings["lr"]) == ("other", rate)
    assert calls == [("world", 1, 5, 0.5, None)]
    assert run("--overlay", "overlay.yaml") == 0
    assert "first (its configuration file has changed)" in fails(capsys)[1]
    assert fails(capsys, "--overlay", "none.yaml") == (
        2, "the configuration file none.yaml does not exist; check the path after --config.",
    )  # fmt: skip


def test_a_list_of_one_file_is_that_file(capsys):
    pipeline({"name": "sft", "fit": ["sft.yaml"]})
    assert run() == 0
    pipeline({"name": "sft", "fit": "sft.yaml"})
    assert run() == 0
    assert "sft: done before (" in capsys.readouterr().out


def test_a_new_stage_runs_on_what_is_done():
    pipeline(WORLD)
    run()
    pipeline(WORLD, SFT)
    assert run() == 0
    assert [call[0] for call in calls] == ["world"]
    assert Path("out/sft/role").is_dir()


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda: pipeline({**WORLD, "arguments": {"rows": 6}}, SFT), "world (other arguments: rows); sft"),
        (lambda: write("conf/sft.yaml", yaml.safe_dump(FIT) + "# x\n"), "sft (its configuration file has changed)"),
        (lambda: pipeline(WORLD, SFT, seed=2), "world (seed 1, not 2); sft (seed 1, not 2"),
        (lambda: pipeline({**WORLD, "run": "tests.cli.stub_pipeline:copy"}, SFT), "world (`run` was tests."),
    ],
)
def test_a_stage_made_from_other_inputs_is_refused(capsys, change, difference):
    pipeline(WORLD, SFT)
    run()
    before = sorted(Path("out").rglob("*"))
    change()
    capsys.readouterr()
    status, error = fails(capsys)
    assert status == 1
    assert error.startswith(f"these finished stages were made from other inputs: {difference}")
    assert f"{Path('out').resolve()}/sft" in error
    assert "remove" in error and error.endswith("or choose another --output_dir.")
    assert sorted(Path("out").rglob("*")) == before


def test_a_stage_is_stale_once_its_input_was_made_again(capsys):
    pipeline(WORLD, SFT)
    run()
    capsys.readouterr()
    Path("out/world").rename("elsewhere")
    _, error = fails(capsys)
    assert "sft (from an earlier run of world)" in error
    assert not Path("out/world").exists()  # refused before anything ran
    Path("out/sft").rename("elsewhere_too")
    assert run() == 0
    assert [call[0] for call in calls] == ["world", "world"]


def test_another_folder_and_seed():
    pipeline(WORLD)
    run()
    assert run("--output_dir", "other", "--seed", "3") == 0
    assert Path("other/world/rows.txt").read_text().startswith("3")
    assert Path("out/world/rows.txt").read_text().startswith("1")


def test_an_interrupted_stage_goes_on_and_one_of_other_inputs_is_moved_aside(capsys):
    pipeline(WORLD, {**SFT, "arguments": {"model.interrupt_at": 1}})
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the power went out"):
            run()
    assert "[2/2] sft: was interrupted, and goes on" in capsys.readouterr().out
    pipeline(WORLD, SFT)
    assert run() == 0
    assert "[2/2] sft: was interrupted; its folder is now sft.interrupted-1" in capsys.readouterr().out
    assert {path.name for path in Path("out").iterdir()} == {"world", "sft", "sft.interrupted-1", "report.html"}
    assert len(calls) == 1
    assert not list(Path("out/sft.interrupted-1").glob("role*"))


def test_a_failed_stage_is_named(capsys):
    pipeline(WORLD, {"name": "bad", "run": "tests.cli.stub_pipeline:fail"})
    assert fails(capsys) == (1, "stage bad: there is too little data; give more rows.")
    assert not Path("out/bad/done.json").exists()
    with pytest.raises(RuntimeError, match="a defect"):
        run("--set", "bad.how=other")


def test_the_configuration_of_a_stage_is_told_from_a_pipeline(capsys):
    assert main(["pipeline", "--config", write("conf/stage.yaml", FIT)]) == 2
    sentence = "conf/stage.yaml is of one stage; run it by `rto-lightning fit --config conf/stage.yaml`."
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "sentence"),
    [
        ({**SFT, "arguments": {"model.lrr": 1}}, "stage sft: unknown key `model.lrr`; did you mean `lr`?"),
        ({**SFT, "arguments": {"model.lr": "{world}"}}, "stage sft: `model.lr` must be a number, not "),
        ({**SFT, "fit": ["sft.yaml", "typo.yaml"]}, "stage sft: conf/typo.yaml line 2: unknown key `trainer.stps`"),
        ({"name": "late", "run": "tests.cli.stub_pipeline:fail", "arguments": {"hwo": 1}}, "stage late: arguments of "),
    ],
)
def test_a_mistake_in_the_settings_of_a_stage_is_found_before_any_runs(capsys, stage, sentence):
    write("conf/typo.yaml", {"trainer": {"stps": 1}})
    path = write("conf/pipeline.yaml", {"stages": [WORLD, stage], "output_dir": "out"})
    assert main(["pipeline", "--config", path]) == 2
    assert sentence in capsys.readouterr().err
    assert not calls and not Path("out").exists()


def test_errors_of_a_fit_stage_are_told_with_its_name(capsys):
    pipeline({"name": "sft", "fit": "sft.yaml", "arguments": {"model.lrr": 1}})
    assert fails(capsys) == (2, "stage sft: unknown key `model.lrr`; did you mean `lr`?")
    pipeline({"name": "rto", "fit": "sft.yaml", "arguments": {"model.dpo": "gone"}})
    assert fails(capsys) == (
        1,
        "stage rto: the dpo role gone does not exist; make it first with: rto-lightning fit --config DPO_CONFIG.yaml",
    )
    pipeline({"name": "rto", "run": "tests.cli.stub_pipeline:needs_dpo", "arguments": {"source": "x"}})
    assert fails(capsys) == (1, "stage rto: no dpo role.")


def test_a_stage_of_several_processes_is_refused(capsys):
    pipeline({"name": "sft", "fit": "sft.yaml", "arguments": {"trainer.devices": 2, "trainer.strategy": "ddp"}})
    assert "runs its stages in one process, and this one asks for 2; run the stage by" in fails(capsys)[1]


def test_set_overrides_arguments():
    pipeline(WORLD, SFT)
    assert run("--set", "world.rows=2", "world.rate=1e-3", "--set", "sft.model.backbone.model={world}") == 0
    assert calls == [("world", 1, 2, 0.001, None)]
    assert json.loads(Path("out/sft/role/role.json").read_text())["model"] == str(Path("out/world").resolve())


def test_function_arguments_are_converted_to_their_annotations():
    pipeline({**WORLD, "arguments": {"size.width": 8, "rate": 1}})
    assert run() == 0
    assert calls == [("world", 1, 3, 1.0, Size(width=8))]
    write("conf/pipeline.yaml", Path("conf/pipeline.yaml").read_text().replace("rate: 1", "rate: 1e-4"))
    assert run("--output_dir", "two") == 0
    assert math.isclose(calls[-1][3], 1e-4)


def test_it_works_under_any_working_directory(monkeypatch, tmp_path):
    pipeline(WORLD, SFT)
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert main(["pipeline", "--config", "../conf/pipeline.yaml", "--output_dir", "../out"]) == 0
    monkeypatch.chdir(tmp_path)
    assert run() == 0
    assert len(calls) == 1


def test_a_broken_record(capsys):
    pipeline(WORLD)
    run()
    Path("out/world/done.json").write_text("{")
    status, error = fails(capsys)
    assert status == 1
    assert error.endswith(f"is no record of a finished stage; remove {Path('out').resolve()}/world to make it again.")


def test_the_table():
    results = [StageResult("world", 1.26, "done before"), StageResult("reward_model", 100.0, "done now")]
    assert format_results(results).splitlines() == [
        "",
        "stage         seconds  state",
        "world             1.3  done before",
        "reward_model    100.0  done now",
        "now             100.0",
    ]
