"""JSONL files that are never overwritten."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rto_lightning.errors import UserError


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write one JSON object a line and return how many there were.

    Raises:
        UserError: if the file exists.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x", encoding="utf-8") as file:
            count = 0
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
    except FileExistsError:
        raise UserError(f"{path} is there already; remove it or choose another folder.") from None
    return count


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Read one JSON object a line; blank lines are skipped.

    Raises:
        UserError: if the file is missing or a line is no JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not there; run the stage that writes it, or name another file.")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}, is not a JSON object; write the file anew.")
        rows.append(row)
    return rows
