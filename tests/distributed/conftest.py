"""Model, data and roles for stages that several processes run."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.distributed.worker import Case
from tests.models import write_tiny_model
from tests.roles import save_random_role

ROOT = Path(__file__).parents[2]
Torchrun = Callable[[int, str, str], str]
Launch = Callable[[Sequence[Case], int], None]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders and files by name: `model`, `dpo` and `reward` of each mode, and data of each kind."""
    folder = tmp_path_factory.mktemp("inputs")
    model = write_tiny_model(folder / "model")  # with tied embeddings
    made = {"model": str(model)}
    for mode in ("adapters", "full"):
        for name in ("dpo", "reward"):
            made[f"{name}_{mode}"] = save_random_role(model, folder / f"{name}_{mode}", name, mode=mode)
    rows = [
        {"prompt": f"Question {n}" + "?" * (n % 5), "chosen": "yes" + "!" * (n % 3), "rejected": "no" + "." * (n % 4)}
        for n in range(24)
    ]
    demonstrations = [{"prompt": row["prompt"], "response": row["chosen"]} for row in rows]
    for name, lines in (("rows", rows), ("demonstrations", demonstrations)):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        made[name] = str(path)
    return made


@pytest.fixture(scope="session")
def torchrun() -> Torchrun:
    """Runs a module of the tests with an argument in several processes, and returns what they printed."""

    def run(processes: int, module: str, argument: str) -> str:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *(launcher if processes > 1 else []), "-m", module, argument]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-9000:]
        return result.stdout

    return run


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory, torchrun: Torchrun) -> Launch:
    """Runs cases in as many processes as asked."""

    def run(cases: Sequence[Case], processes: int) -> None:
        path = tmp_path_factory.mktemp("cases") / "cases.json"
        path.write_text(json.dumps([asdict(case) for case in cases]))
        torchrun(processes, "tests.distributed.worker", str(path))

    return run
