"""The table of private names is complete, has nothing that is no longer used, and holds for the installed versions."""

import ast
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import rto_lightning
from rto_lightning.private_names import PRIVATE_NAMES, PrivateName

ROOT = Path(rto_lightning.__file__).parent
TREES = {
    str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(ROOT.rglob("*.py"))
    if path.name not in ("__main__.py", "private_names.py")
}
LIBRARIES = {"datasets", "jsonargparse", "lightning", "peft", "torch", "transformers", "yaml"}
PUBLIC = {"_asdict", "_exit", "_fields", "_replace"}
"""Documented names of the standard library."""
SUFFIXES = {"_chosen", "_dropout", "_like_length", "_rejected", "_std"}
"""Strings of this package that are appended to names."""


def is_private(name: str) -> bool:
    return re.fullmatch(r"_[A-Za-z]\w*", name) is not None and name not in PUBLIC


def definitions(tree: ast.Module) -> set[str]:
    """Private names that a file defines: functions, classes and variables, and `self._name` for what objects set."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            found.add(f"self.{node.attr}")
    return found


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def foreign_names(tree: ast.Module, own: set[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if node.attr not in own and not (is_self(node.value) and f"self.{node.attr}" in own):
                yield node.attr
        elif isinstance(node, ast.keyword) and node.arg is not None and is_private(node.arg):
            yield node.arg
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and is_private(node.value):
            if node.value not in own | SUFFIXES:
                yield node.value
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            if node.module.partition(".")[0] != "rto_lightning":
                parts = (*node.module.split("."), *(alias.name for alias in node.names))
                yield from filter(is_private, parts)
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split(".") if is_private(part))


def overrides(file: str) -> Iterator[str]:
    """Private methods of other libraries' classes that the classes of a file override."""
    module = import_module(".".join(("rto_lightning", *Path(file).with_suffix("").parts)).removesuffix(".__init__"))
    for cls in vars(module).values():
        if inspect.isclass(cls) and cls.__module__ == module.__name__:
            foreign = [base for base in cls.__mro__[1:] if base.__module__.partition(".")[0] in LIBRARIES]
            for name, value in vars(cls).items():
                if is_private(name) and inspect.isroutine(value) and any(name in vars(base) for base in foreign):
                    yield name


def test_the_table_lists_what_is_used_and_nothing_else() -> None:
    own = set().union(*map(definitions, TREES.values()))
    used = {(file, name) for file, tree in TREES.items() for name in foreign_names(tree, own)}
    used |= {(file, name) for file in TREES for name in overrides(file)}
    listed = {(file, entry.name) for entry in PRIVATE_NAMES for file in entry.used_in}
    assert sorted(used - listed) == []
    assert sorted(listed - used) == []


def resolve(owner: str) -> Any:
    module, _, name = owner.partition(":")
    return getattr(import_module(module), name) if name else import_module(module)


def exists(entry: PrivateName) -> bool:
    owner = resolve(entry.owner)
    if hasattr(owner, entry.name):
        return True
    if inspect.ismodule(owner):
        import_module(f"{entry.owner}.{entry.name}")
        return True
    if inspect.isfunction(owner):
        return entry.name in inspect.signature(owner).parameters
    return re.search(rf"\bself\.{entry.name}\b.*=", inspect.getsource(owner)) is not None


@pytest.mark.parametrize("entry", PRIVATE_NAMES, ids=lambda entry: f"{entry.owner}.{entry.name}")
def test_the_installed_libraries_have_it(entry: PrivateName) -> None:
    assert exists(entry), f"{entry.owner} has no {entry.name} any more, which {', '.join(entry.used_in)} needs"
