"""Mistakes in a pipeline file and on its command line, each told in one sentence."""

from pathlib import Path

import pytest

from tests.cli.stub_pipeline import SFT, WORLD, fails, pipeline
from tests.cli.stub_runs import write

pytestmark = pytest.mark.usefixtures("pipeline_folder")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"stages": [WORLD], "sede": 1}, "unknown key `sede`; known: stages, output_dir, seed."),
        ({"output_dir": "out"}, "the key `stages` is missing."),
        ({"stages": []}, "`stages` is empty; give at least one stage."),
        ({"stages": [WORLD], "seed": "one"}, "`seed` must be a whole number, not 'one'."),
        (
            {"stages": [{**WORLD, "argument": {}}]},
            "stage 1 (world): unknown key `argument`; known: name, fit, run, arguments.",
        ),
        ({"stages": ["world"]}, "stage 1 must be a mapping with `name` and `fit` or `run`, not 'world'."),
        ({"stages": [{"run": "a:b"}]}, "stage 1: the key `name` is missing."),
        (
            {"stages": [{"name": "a/b", "run": "a:b"}]},
            "stage 1 (a/b): `name` may hold letters, digits, - and _ only, as it names a folder.",
        ),
        (
            {"stages": [WORLD, WORLD]},
            "stage 2 (world): an earlier stage has the same name; names must differ.",
        ),
        (
            {"stages": [{"name": "a"}]},
            "stage 1 (a): give either `fit` (a configuration file) or `run` (module:function).",
        ),
        (
            {"stages": [{"name": "a", "fit": "none.yaml"}]},
            "stage 1 (a): the file conf/none.yaml of `fit` does not exist.",
        ),
        (
            {"stages": [{"name": "a", "fit": ["sft.yaml", "none.yaml"]}]},
            "stage 1 (a): the file conf/none.yaml of `fit` does not exist.",
        ),
        ({"stages": [{"name": "a", "fit": []}]}, "stage 1 (a): `fit` is an empty list; give at least one file."),
        ({"stages": [{"name": "a", "fit": 3}]}, "stage 1 (a): `fit` must be a file or a list of files, not 3."),
        (
            {"stages": [{"name": "a", "run": "module"}]},
            "stage 1 (a): `run` must have the form module:function, not module.",
        ),
        (
            {"stages": [SFT, WORLD]},
            "stage 1 (sft): `model.backbone.model` names {world}, no earlier stage (earlier: none).",
        ),
        (
            {"stages": [{**WORLD, "arguments": {"size": {"width": ["{wrld}"]}}}]},
            "stage 1 (world): `size` names {wrld}, no earlier stage (earlier: none).",
        ),
    ],
)
def test_mistakes_in_the_file(capsys, content, sentence):
    write("conf/pipeline.yaml", content)
    status, error = fails(capsys)
    assert status == 2
    assert error == f"conf/pipeline.yaml: {sentence}"
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("stage", "sentence"),
    [
        (
            {"run": "tests.nowhere:f"},
            "stage a: `run: tests.nowhere:f`: there is no module tests.nowhere.",
        ),
        (
            {"run": "tests.cli.stub_pipeline:f"},
            "stage a: `run: tests.cli.stub_pipeline:f`: the module tests.cli.stub_pipeline has no function f.",
        ),
        (
            {"run": "tests.cli.stub_pipeline:make_world", "arguments": {"rosw": 1}},
            "stage a: arguments of tests.cli.stub_pipeline:make_world: unknown key `rosw`; did you mean `rows`?",
        ),
        (
            {"run": "tests.cli.stub_pipeline:make_world", "arguments": {"rows": "many"}},
            "stage a: arguments of tests.cli.stub_pipeline:make_world: `rows` must be a whole number, not many.",
        ),
        (
            {"run": "tests.cli.stub_pipeline:copy"},
            "stage a: arguments of tests.cli.stub_pipeline:copy: `source` is not set.",
        ),
    ],
)
def test_functions_that_cannot_be_called(capsys, stage, sentence):
    pipeline({"name": "a", **stage})
    assert fails(capsys) == (2, sentence)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--set", "world"], "--set world: must have the form STAGE.KEY=VALUE."),
        (["--set", "wrld.rows=1"], "--set wrld.rows=1: there is no stage `wrld`; stages: world."),
        (
            ["--set", "world.rows={sft}"],
            "--set: stage world: `rows` names {sft}, no earlier stage (earlier: none).",
        ),
        (
            ["--seed", "x"],
            "argument --seed: invalid int value: 'x'; `rto-lightning pipeline --help` lists the options.",
        ),
        (
            ["--bar"],
            "unrecognized arguments: --bar; `rto-lightning pipeline --help` lists the options.",
        ),
    ],
)
def test_mistakes_on_the_command_line(capsys, args, sentence):
    pipeline(WORLD)
    assert fails(capsys, *args) == (2, sentence)
    assert not Path("out").exists()
