"""Everything public says what it is, and the mathematics says what each of its parameters is."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import rto_lightning

ROOT = Path(rto_lightning.__file__).parent
Function = ast.FunctionDef | ast.AsyncFunctionDef


def trees(folder: Path) -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(folder.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def public_parts(node: ast.Module | ast.ClassDef) -> Iterator[Function | ast.ClassDef]:
    """Public functions, classes and methods; the stubs of overloads are no functions of their own."""
    for part in node.body:
        if not isinstance(part, Function | ast.ClassDef) or part.name.startswith("_"):
            continue
        if any(isinstance(mark, ast.Name) and mark.id == "overload" for mark in part.decorator_list):
            continue
        yield part
        if isinstance(part, ast.ClassDef):
            yield from public_parts(part)


def test_everything_public_has_a_docstring() -> None:
    missing = []
    for path, tree in trees(ROOT):
        place = path.relative_to(ROOT.parent)
        missing += [str(place)] if ast.get_docstring(tree) is None else []
        missing += [f"{place}:{p.lineno} {p.name}" for p in public_parts(tree) if ast.get_docstring(p) is None]
    assert missing == []


def test_the_mathematics_documents_every_parameter_in_order() -> None:
    functions = 0
    wrong = {}
    for _, tree in trees(ROOT / "algorithms"):
        for part in tree.body:
            if isinstance(part, ast.FunctionDef) and not part.name.startswith("_"):
                functions += 1
                parameters = [
                    argument.arg for argument in (*part.args.posonlyargs, *part.args.args, *part.args.kwonlyargs)
                ]
                if documented(ast.get_docstring(part) or "") != parameters:
                    wrong[part.name] = parameters
    assert functions > 20
    assert wrong == {}


def documented(docstring: str) -> list[str]:
    """The names in the section `Args` of a docstring."""
    section = re.search(r"^Args:\n((?: .*\n|\n)*)", docstring + "\n", re.MULTILINE)
    return re.findall(r"^    (\w+):", section[1], re.MULTILINE) if section else []
