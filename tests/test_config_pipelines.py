"""Every pipeline under `configs/` is run with stages that only read their settings."""

import functools
from pathlib import Path
from typing import Any

import pytest

from rto_lightning.cli import main, pipeline
from rto_lightning.cli.lightning_cli import RTOCLI
from rto_lightning.cli.pipeline_settings import load_pipeline
from tests.config_files import PIPELINES, QUICK_PIPELINES, ROOT, cases, value_at


@pytest.fixture
def read_only_stages(monkeypatch) -> dict[str, Any]:
    """Lets stages of a pipeline read their settings and do nothing; returns what they read, by their folder's name."""
    seen: dict[str, Any] = {}

    def parsed(self: RTOCLI) -> None:
        settings = self.config[self.subcommand]
        folder = Path(settings.trainer.default_root_dir)
        (folder / "role").mkdir()
        seen[folder.name] = settings

    monkeypatch.setattr(RTOCLI, "before_instantiate_classes", parsed)
    monkeypatch.setattr(RTOCLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(RTOCLI, "_run_subcommand", lambda self, command: None)
    find = pipeline._import_function

    def find_and_wrap(target: str) -> Any:
        @functools.wraps(find(target))  # with it the signature, by which arguments are checked
        def record(output_dir: Path, seed: int, **arguments: Any) -> None:
            seen[output_dir.name] = arguments

        return record

    monkeypatch.setattr(pipeline, "_import_function", find_and_wrap)
    return seen


@pytest.mark.parametrize("path", cases(PIPELINES, QUICK_PIPELINES))
def test_a_pipeline_gives_its_stages_what_they_take(path: Path, tmp_path: Path, monkeypatch, read_only_stages) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_pipeline(path)
    assert all((path.parent / name).is_file() for stage in settings.stages for name in stage.files)
    assert main(["pipeline", "--config", str(path), "--output_dir", "out"]) == 0
    folders = {stage.name: str(tmp_path / "out" / stage.name) for stage in settings.stages}
    assert list(read_only_stages) == list(folders)
    for stage in settings.stages:
        for key, value in stage.arguments.items():
            assert value_at(read_only_stages[stage.name], key) == filled(value, folders)


def filled(value: Any, folders: dict[str, str]) -> Any:
    """A pipeline's argument with each stage's folder in the place of its name, in texts and mappings."""
    if isinstance(value, dict):
        return {key: filled(item, folders) for key, item in value.items()}
    return value.format(**folders) if isinstance(value, str) else value


@pytest.mark.parametrize(("name", "option"), [("quickstart", "world.reviews=1"), ("smollm2_135m", "dpo.model.bet=1")])
def test_a_key_that_a_stage_does_not_take_is_found(name, option, tmp_path, monkeypatch, read_only_stages, capsys):
    monkeypatch.chdir(tmp_path)
    path = ROOT / "configs" / name / "pipeline.yaml"
    assert main(["pipeline", "--config", str(path), "--output_dir", "out", "--set", option]) == 2
    stage, _, key = option.partition("=")[0].partition(".")
    error = capsys.readouterr().err
    assert f"stage {stage}: " in error and f"unknown key `{key}`" in error
    assert not read_only_stages
