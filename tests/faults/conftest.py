"""Models, rows and whole runs that faults are put on. They are counted by the fixture `faults`."""

import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.faults.matrix import MATRIX, FaultMatrix
from tests.faults.runs import fit, result, write_config
from tests.models import write_tiny_model
from tests.roles import save_random_role


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark two of three cases of each test here as exhaustive, so that continuous integration tries every third."""
    cases: Counter[str] = Counter()
    for item in items:
        if Path(__file__).parent in item.path.parents:
            test = item.nodeid.partition("[")[0]
            if cases[test] % 3:
                item.add_marker(pytest.mark.exhaustive)
            cases[test] += 1


@pytest.fixture
def faults() -> FaultMatrix:
    """Counts faults, for the table at the end of the run."""
    return MATRIX


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model, its roles and rows that serve every stage; by name."""
    folder = tmp_path_factory.mktemp("inputs")
    model = write_tiny_model(folder / "model")
    made = {name: save_random_role(model, folder / name, name) for name in ("dpo", "reward")}
    rows = [
        {"prompt": f"Question {n}" + "?" * (n % 5), "chosen": "yes" + "!" * (n % 3), "rejected": "no" + "." * (n % 4)}
        for n in range(12)
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"model": str(model), "rows": str(path), **made}


@pytest.fixture(scope="session")
def whole(inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The configuration of a stage, and what its run makes when nothing happens."""
    folder = tmp_path_factory.mktemp("whole")

    @cache
    def run(stage: str) -> tuple[Path, dict[str, Any]]:
        config = write_config(folder, stage, inputs)
        assert fit(config, folder / stage) == 0, (folder / f"{stage}.log").read_text()
        return config, result(folder / stage)

    return run
