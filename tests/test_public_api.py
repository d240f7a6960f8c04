"""What `import rto_lightning` offers, and that it costs nothing until it is used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rto_lightning


@pytest.mark.parametrize("name", rto_lightning.__all__)
def test_a_name_is_the_one_of_its_package(name: str) -> None:
    value = getattr(rto_lightning, name)
    assert value.__name__ == name
    assert value is getattr(sys.modules[".".join(value.__module__.split(".")[:2])], name)


def test_type_checkers_see_the_same_names_in_the_same_places() -> None:
    tree = ast.parse(Path(rto_lightning.__file__).read_text(encoding="utf-8"))
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        node.module: tuple(alias.name for alias in node.names) for node in ast.walk(checked) if hasattr(node, "names")
    }
    assert {place: set(names) for place, names in seen.items()} == {
        place: set(names) for place, names in rto_lightning._PLACES.items()
    }
    assert sorted(name for names in seen.values() for name in names) == sorted(rto_lightning.__all__)


def test_names_are_listed_and_others_are_refused() -> None:
    assert set(rto_lightning.__all__) <= set(dir(rto_lightning))
    with pytest.raises(AttributeError, match="no attribute 'PPOModule'"):
        rto_lightning.PPOModule  # noqa: B018
    with pytest.raises(ImportError, match="PPOModule"):
        from rto_lightning import PPOModule  # noqa: F401


def test_importing_the_package_loads_no_library() -> None:
    code = "import sys; import rto_lightning; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "rto_lightning" in loaded
    assert not {"datasets", "lightning", "numpy", "torch", "transformers", "yaml"} & set(loaded)
