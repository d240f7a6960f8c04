"""The whole quickstart, as a user runs it: what it claims must hold, and a second call must find nothing to do."""

import hashlib
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from rto_lightning.cli.pipeline_settings import load_pipeline
from rto_lightning.quickstart.curves import read_curve
from tests.quickstart.report_table import read_table

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs/quickstart/pipeline.yaml"
METHODS = ROOT / "configs/quickstart/methods.yaml"
METHODS_OF_ITERATIONS = 11


def run_pipeline(output: Path, working_directory: Path, config: Path = CONFIG, changes: Sequence[str] = ()) -> str:
    """Runs the command in a process of its own and returns what it printed."""
    command = ["pipeline", "--config", str(config), "--output_dir", str(output)]
    result = subprocess.run(
        [sys.executable, "-m", "rto_lightning", *command, *(["--set", *changes] if changes else [])],
        cwd=working_directory,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Each file with its time of writing and its bytes."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def weights_digest(folder: Path) -> str:
    """A digest of a saved role's weights."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def check_claims(report: str) -> None:
    """PPO and RTO gain more than two standard errors of the paired difference over SFT."""
    table = read_table(report)
    assert list(table) == ["SFT", "DPO", "PPO", "RTO"]
    assert table["SFT"].kl == (0.0, 0.0)
    for policy in ("PPO", "RTO"):
        gain, error = table[policy].gain
        assert gain > 2 * error > 0, f"{policy} gains {gain} ± {error} over SFT"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_quickstart_keeps_its_promise_and_is_done_once(tmp_path: Path) -> None:
    output, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    stages = [stage.name for stage in load_pipeline(CONFIG).stages]
    printed = run_pipeline(output, elsewhere)
    assert printed.count("done now") == len(stages)
    report = (output / "report/report.md").read_text(encoding="utf-8")
    assert report in printed
    check_claims(report)
    assert {path.name for path in output.iterdir()} == {*stages, "report.html"}
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "Before training" in page and "rto, after 60 iterations" in page and "Score against KL" in page
    assert not list(elsewhere.iterdir())

    before = contents(output)
    printed = run_pipeline(output, elsewhere)
    for number, stage in enumerate(stages, start=1):
        assert f"[{number}/{len(stages)}] {stage}: done before (" in printed
    assert "done now" not in printed
    assert contents(output) == before


@pytest.mark.slow
@pytest.mark.exhaustive
def test_one_command_trains_and_compares_every_method(tmp_path: Path) -> None:
    """With a model that has just learned to use words, and few steps of each method."""
    settings = load_pipeline(METHODS)
    steps = {"sft.yaml": 150, "dpo.yaml": 3, "reward_model.yaml": 3, "rto.yaml": 2}
    changes = [f"{stage.name}.trainer.max_steps={steps[stage.files[0]]}" for stage in settings.stages if stage.files]
    changes += ["world.train_reviews=4800", "world.validation_reviews=32", "world.test_prompts=8"]
    changes += ["preferences.pairs=96", "preferences.validation_pairs=32", "compare.answers_per_prompt=2"]
    printed = run_pipeline(tmp_path / "out", tmp_path, METHODS, changes)
    report = (tmp_path / "out/compare/report.md").read_text(encoding="utf-8")
    assert report in printed
    assert (tmp_path / "out/compare/learning_curves.png").is_file()

    table = read_table(report)
    assert list(table) == ["SFT", *settings.stages[-1].arguments["policies"]]
    numbers = [number for row in table.values() for number in (*row.gold, *row.kl, *row.length)]
    assert all(math.isfinite(number) for number in numbers)
    trained = [stage.name for stage in settings.stages if stage.files and stage.files[0] != "reward_model.yaml"]
    weights = {weights_digest(tmp_path / "out" / stage / "role") for stage in trained}
    assert len(weights) == len(trained) == len(table), "two methods ended as the same policy"
    curves = {stage.name: read_curve(str(tmp_path / "out" / stage.name)) for stage in settings.stages}
    lengths = [len(curve) for curve in curves.values() if curve]
    assert lengths == [2] * METHODS_OF_ITERATIONS


REPORT = """\
128 held-out prompts, 4 answers of each policy to each, seed 1:

| policy |  gold reward | gain over SFT | win rate against SFT |   KL (nats) | length (tokens) |
| :----- | -----------: | ------------: | -------------------: | ----------: | --------------: |
| SFT    | -0.02 ± 0.06 |               |                      | 0.00 ± 0.00 |    13.84 ± 0.32 |
| DPO    |  0.84 ± 0.05 |  +0.85 ± 0.07 |                66.8% | 0.90 ± 0.05 |    13.15 ± 0.26 |
| PPO    |  0.12 ± 0.05 |  +0.14 ± 0.07 |                51.0% | 0.47 ± 0.03 |    11.14 ± 0.21 |
| RTO    |  0.91 ± 0.05 |  +0.93 ± 0.07 |                68.9% | 1.27 ± 0.06 |    10.05 ± 0.18 |
"""


def test_the_claims_are_read_from_the_table() -> None:
    table = read_table(REPORT)
    assert table["RTO"].gain == (0.93, 0.07) and table["SFT"].gain is None
    assert table["DPO"].win_rate == pytest.approx(0.668)
    with pytest.raises(AssertionError, match="PPO gains"):  # exactly two standard errors are not more
        check_claims(REPORT)
    check_claims(REPORT.replace("+0.14 ± 0.07", "+0.15 ± 0.07"))
