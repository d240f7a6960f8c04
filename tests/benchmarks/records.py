"""Reading and writing of what was measured."""

import csv
import json
import math
import os
from pathlib import Path
from typing import Any

CURVES = {
    "gold": "train/gold",
    "kl": "train/kl",
    "score": "train/score",
    "length": "train/response/length",
    "truncated": "train/response/truncated",
}
"""Quantities of each iteration, means over its responses, and their columns in metrics.csv."""


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: Any, indent: int | None = 1) -> None:
    """Write a JSON file that is always whole; numbers that are not finite become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(finite(content), indent=indent, allow_nan=False) + "\n", encoding="utf-8")
    partial.rename(path)


def finite(content: Any) -> Any:
    """The same content with None in the place of numbers that are not finite."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return content


def read_cells(work: Path, known: dict[str, dict[str, Any]] | None = None) -> dict[str, dict[str, Any]]:
    """The finished cells of a work folder by name; those in `known` are not read again."""
    known = known or {}
    root = work / "cells"
    names = [path.relative_to(root).with_suffix("").as_posix() for path in sorted(root.glob("*/*/*.json"))]
    return {name: known[name] if name in known else read_json(root / f"{name}.json") for name in names}


def metrics_rows(stage: Path) -> list[dict[str, str]]:
    """The rows that a stage logged."""
    with (stage / "metrics" / "fit" / "metrics.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def last_metric(stage: Path, name: str) -> float:
    """What a stage logged last under a name."""
    return float([row[name] for row in metrics_rows(stage) if row.get(name)][-1])


def read_curves(stage: Path) -> dict[str, list[float]]:
    """The quantities of `CURVES` for each iteration of an RTO stage."""
    rows = [row for row in metrics_rows(stage) if row.get(CURVES["gold"])]
    return {name: [float(row[column]) for row in rows] for name, column in CURVES.items()}
