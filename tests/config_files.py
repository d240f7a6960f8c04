"""The files under `configs/`, and how tests name them."""

from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").rglob("*.y*ml"))
PIPELINES = [path for path in FILES if "\nstages:" in path.read_text(encoding="utf-8")]
STAGES = [path for path in FILES if path not in PIPELINES]
QUICK_STAGES = ("quickstart/", "smollm2_135m/", "strategy/ddp.", "strategy/fsdp.")  # offloading is for GPUs
QUICK_PIPELINES = ("smollm2_135m/",)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs"))


def cases(paths: list[Path], quick: tuple[str, ...]) -> list[Any]:
    """A case for each file; those whose names do not begin so are slow, since together they take minutes."""
    return [
        pytest.param(path, id=name_of(path), marks=() if name_of(path).startswith(quick) else pytest.mark.slow)
        for path in paths
    ]


def value_at(settings: Any, key: str) -> Any:
    """The value that a dotted key of the command line has in parsed settings; `init_args` may be left out."""
    for part in key.split("."):
        if part not in settings and "init_args" in settings:
            settings = settings["init_args"]
        settings = settings[part]
    return settings
