"""The packages' imports go one way."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "rto_lightning"


def imported_packages(folder: Path) -> set[str]:
    """Other packages of ours from which the files of one import anything, at any time."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found |= {name.split(".")[1] for name in names if name.startswith("rto_lightning.")}
    return {name for name in found if (PACKAGE / name).is_dir()} - {folder.name}


def test_imports_go_one_way() -> None:
    folders = [path.parent for path in PACKAGE.glob("*/__init__.py")]
    graph = {folder.name: imported_packages(folder) for folder in folders}
    assert "cli" in graph and "algorithms" in graph["modules"]
    order = list(TopologicalSorter(graph).static_order())  # CycleError names the packages of a cycle
    assert order.index("backbone") < order.index("rollout") < order.index("modules")
    assert not any("cli" in imported for imported in graph.values())
    assert not graph["algorithms"]
    assert not graph["evaluation"] & {"modules", "export", "callbacks", "inspection"}
