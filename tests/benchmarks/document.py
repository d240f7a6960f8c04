"""The one file that is kept: every cell that a figure in the report comes from, and the summary of each method.

`collect` makes it from a work folder. Curves are kept for stage C; of the tuning runs the final figures are.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.plan import (
    Cell,
    Records,
    choose_configuration,
    choose_shared,
    chosen_cells,
    configuration_cells,
    preference_cells,
    shared_cells,
    stages,
    sweep_cells,
)
from tests.benchmarks.protocol import BASELINE, GoldName, Method, Protocol, Settings
from tests.benchmarks.records import finite, read_cells, read_json
from tests.benchmarks.summary import WINDOW, final_summary, method_summary

DIGITS = 3
"""Decimals of what was measured."""


def collect(protocol: Protocol, work: Path) -> dict[str, Any]:
    """Merge the cells of a work folder; what is not finished yet is left out and counted."""
    records = read_cells(work)
    window = min(WINDOW, max(1, protocol.iterations // 2))
    plan = list(stages(protocol, records))
    done = [records[cell.name] for stage in plan for cell in stage.cells if cell.name in records]
    document = {
        "iterations": protocol.iterations,
        "responses": protocol.responses,
        "window": window,
        "missing": sum(stage.size for stage in plan) - len(done),
        "commits": sorted({str(record["commit"]) for record in done}),
        "golds": {
            gold: _gold(protocol, gold, records, work, window)
            for gold in protocol.golds
            if any(name.startswith(f"{gold}/") for name in records)
        },
        "sweep": [
            _tried(settings, row, records)
            for settings, row in zip(protocol.sweep, sweep_cells(protocol, records), strict=False)
        ],
    }
    return finite(document)


def _gold(protocol: Protocol, gold: GoldName, records: Records, work: Path, window: int) -> dict[str, Any]:
    measured = sorted((work / "prepared").glob(f"seed*/{gold}/measured.json"))
    shared = choose_shared(protocol, gold, records)
    methods: dict[str, dict[str, Any]] = {}
    for method in protocol.methods:
        chosen = choose_configuration(protocol, gold, method, records)
        tried = [configuration_cells(protocol, gold, method, shared, row) for row in method.tried] if shared else []
        fresh = chosen_cells(protocol, gold, method, chosen) if chosen is not None else []
        methods[method.name] = {
            "title": method.title,
            "chosen": _own(method, chosen) if chosen is not None else None,
            "tried": [_tried(row, group, records) for row, group in zip(method.tried, tried, strict=False)],
            "runs": [_run(records[cell.name]) for cell in fresh if cell.name in records],
        }
    baseline = methods[BASELINE]["runs"]
    for line in methods.values():
        line["summary"] = method_summary(line["runs"], baseline, window)
    direct: dict[str, dict[str, Any]] = {}
    for method in protocol.preference_methods:
        cells = preference_cells(protocol, gold, method)
        runs = [_run(records[cell.name]) for cell in cells if cell.name in records]
        direct[method.name] = {
            "title": method.title,
            "settings": method.fixed,
            "runs": runs,
            "summary": final_summary(runs),
        }
    return {
        "preparation": [rounded(read_json(path)) for path in measured],
        "shared": {
            "chosen": shared,
            "tried": [_tried(row, shared_cells(protocol, gold, row), records) for row in protocol.shared],
        },
        "methods": methods,
        "direct": direct,
    }


def _own(method: Method, chosen: Settings) -> Settings:
    """Of all settings those that stage B chose among."""
    return {name: chosen[name] for name in method.tried[0]}


def _tried(settings: Settings, cells: Sequence[Cell], records: Records) -> dict[str, Any]:
    """A configuration and the final figures of its runs."""
    runs = [{**_run(records[cell.name]), "curves": None} for cell in cells if cell.name in records]
    return {"settings": settings, "runs": runs}


def _run(record: Any) -> dict[str, Any]:
    names = ("seed", "error", "diverged", "seconds", "validation", "test", "curves")
    return rounded({name: record.get(name) for name in names})


def rounded(content: Any) -> Any:
    """The same content with floats rounded to `DIGITS` decimals."""
    if isinstance(content, float):
        return round(content, DIGITS)
    if isinstance(content, dict):
        return {key: rounded(value) for key, value in content.items()}
    if isinstance(content, list):
        return [rounded(value) for value in content]
    return content


def write_document(path: Path, document: Any) -> None:
    """Write it with a line for each list of numbers and each small mapping, so that changes can be read in git."""
    text = json.dumps(document, indent=1, allow_nan=False)
    innermost = r"([\[{])\s+([^\[\]{}]*?)\s+([\]}])"
    flat = re.sub(innermost, lambda part: part[1] + " ".join(part[2].split()) + part[3], text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(flat + "\n", encoding="utf-8")
