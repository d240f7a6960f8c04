"""The notebooks are committed with their outputs, and run from a clean kernel."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
TIME_LIMIT = 1200.0
"""Seconds after which a notebook hangs; on two cores of a recent processor each takes a minute or two."""

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code" and "".join(cell["source"]).strip()]


def outputs(notebook: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (output for cell in code_cells(notebook) for output in cell["outputs"])


def figures(notebook: dict[str, Any]) -> list[int]:
    """Number of pictures under each cell."""
    return [sum("image/png" in output.get("data", {}) for output in cell["outputs"]) for cell in code_cells(notebook)]


@each_notebook
def test_committed_outputs_are_of_one_run_from_top_to_bottom(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    counts = [cell["execution_count"] for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))


@each_notebook
def test_committed_outputs_hold_no_error_and_no_warning(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert not [output for output in outputs(notebook) if output["output_type"] == "error"]
    assert not [output["text"] for output in outputs(notebook) if output.get("name") == "stderr"]


@pytest.mark.slow
@each_notebook
def test_runs_from_a_clean_kernel(path: Path) -> None:
    """To its end, and with the figures that are committed."""
    import nbclient
    import nbformat

    committed = nbformat.read(path, as_version=4)
    fresh = nbformat.read(path, as_version=4)
    for cell in code_cells(fresh):
        cell["outputs"], cell["execution_count"] = [], None
    end = time.monotonic() + TIME_LIMIT
    client = nbclient.NotebookClient(
        fresh,
        kernel_name="python3",
        timeout_func=lambda cell: max(1.0, end - time.monotonic()),
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    assert figures(fresh) == figures(committed)
    assert sum(figures(fresh)) > 0
