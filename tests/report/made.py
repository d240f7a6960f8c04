"""Folders of finished stages, made by hand."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rto_lightning.inspection import RewardedResponse
from rto_lightning.inspection.samples import SAMPLES_FILE, Sample
from rto_lightning.report import ReportedStage


def write_stage(
    root: Path, name: str, columns: Mapping[str, Sequence[float | None]], samples: Sequence[Sample] = ()
) -> ReportedStage:
    """A stage that trained a role and logged these columns, a value a step."""
    folder = root / name
    (folder / "role").mkdir(parents=True)
    metrics = folder / "metrics/fit/metrics.csv"
    metrics.parent.mkdir(parents=True)
    with metrics.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, "step"])
        length = max(map(len, columns.values()))
        for step in range(length):
            values = [column[step] if step < len(column) else None for column in columns.values()]
            writer.writerow(["" if value is None else value for value in values] + [step])
    if samples:
        lines = [json.dumps(sample.row()) + "\n" for sample in samples]
        (folder / SAMPLES_FILE).write_text("".join(lines), encoding="utf-8")
    return ReportedStage(name, f"fit {name}.yaml", 12.34, folder)


def sample(iteration: int, response: RewardedResponse, index: int = 0) -> Sample:
    return Sample(iteration, index, response, kl=0.5, total=1.0, truncated=False)


def rto_columns(iterations: int = 60, gain: float = 1.0) -> dict[str, list[float | None]]:
    steps = range(iterations)
    return {
        "train/score": [gain * step / iterations for step in steps],
        "train/kl": [3.0 * step / iterations for step in steps],
        "train/reward/total": [gain * step / iterations - 0.1 for step in steps],
        "train/response/length": [12.0 for _ in steps],
    }
