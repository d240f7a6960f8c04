import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rto_lightning.backbone.chat import ChatTokenizer
from tests.tiny import tiny_tokenizer


@pytest.fixture
def chat() -> ChatTokenizer:
    return ChatTokenizer(tiny_tokenizer())


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[[list[Any]], str]:
    """Writes rows to a file and returns its path."""

    def write(rows: list[Any], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
        return str(path)

    return write
