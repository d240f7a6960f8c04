"""Settings of the stub stage, and its runs by the command."""

import csv
import json
from pathlib import Path

import yaml

from rto_lightning.cli import main

STAGE = {
    "model": {"class_path": "tests.cli.stub_stage.StubStage", "init_args": {"backbone": {"model": "m"}}},
    "data": {"class_path": "tests.cli.stub_stage.StubData"},
    "trainer": {"max_steps": 3, "accelerator": "cpu", "enable_model_summary": False},
}


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
