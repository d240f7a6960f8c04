from pathlib import Path

import pytest

from rto_lightning.cli import lightning_cli
from tests.cli.stub_pipeline import FIT, calls
from tests.cli.stub_runs import write
from tests.cli.stub_stage import StubBase


@pytest.fixture
def stub_stages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In an empty folder, where the command knows the stub stage alone."""
    monkeypatch.setattr(lightning_cli, "stage_module_class", lambda: StubBase)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def pipeline_folder(stub_stages: None) -> None:
    """With the configuration of a stage in `conf`."""
    calls.clear()
    write("conf/sft.yaml", FIT)
