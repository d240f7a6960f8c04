import ast
from pathlib import Path

from rto_lightning import theory


def test_public_names_exist_and_are_sorted() -> None:
    assert all(hasattr(theory, name) for name in theory.__all__)
    assert theory.__all__ == sorted(theory.__all__, key=lambda name: (not name[0].isupper(), name))


def test_every_exported_function_is_documented() -> None:
    for file in Path(theory.__file__).parent.glob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{file.name}: {node.name}"
