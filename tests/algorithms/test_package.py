"""The package imports torch and nothing else."""

import ast
import sys
from pathlib import Path

import pytest

from rto_lightning import algorithms

FILES = sorted(Path(algorithms.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_imports_torch_only(file: Path) -> None:
    modules = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None
            modules.add(node.module)
    foreign = {
        name
        for name in modules
        if name.split(".")[0] not in {"torch", *sys.stdlib_module_names}
        and not name.startswith("rto_lightning.algorithms.")
    }
    assert not foreign


def test_every_public_function_is_exported() -> None:
    written = set()
    for file in FILES:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                written.add(node.name)
    assert written <= set(algorithms.__all__)
    assert all(hasattr(algorithms, name) for name in algorithms.__all__)
