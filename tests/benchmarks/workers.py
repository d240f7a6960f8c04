"""Worker processes that take the next cell that can be run, until there is none."""

import fcntl
import fnmatch
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.benchmarks.plan import Cell, stages
from tests.benchmarks.protocol import CONFIGS, Protocol
from tests.benchmarks.records import read_cells, read_json, write_json

CONFIG_NAMES = ("sft", "dpo", "reward_model", "rto")


def claim(protocol: Protocol, work: Path) -> None:
    """Mark a work folder as made by this protocol's preparation and the quickstart's configurations.

    Raises:
        SystemExit: if it was made by others: its cells could not be compared with new ones.
    """
    configs = {name: yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")) for name in CONFIG_NAMES}
    mark = {
        "preparation": dict(protocol.preparation),
        "responses": protocol.responses,
        "minibatch": protocol.minibatch,
        "configs": configs,
    }
    path = work / "made_by.json"
    if not path.exists():
        write_json(path, mark)
    elif (before := read_json(path)) != json.loads(json.dumps(mark)):
        changed = [name for name, config in configs.items() if before["configs"].get(name) != config]
        what = ", ".join(changed) or "preparation"
        raise SystemExit(f"{work} was begun with other settings ({what} changed); give another --work.")


@contextmanager
def lock(path: Path) -> Iterator[bool]:
    """Hold a lock file, and say whether it could be had; the system frees it when its process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def open_cells(protocol: Protocol, records: dict[str, dict[str, Any]], only: str) -> list[Cell]:
    """Cells that can be run now and are not done, in the protocol's order, each once."""
    cells = {cell.name: cell for stage in stages(protocol, records) for cell in stage.cells}
    return [cell for name, cell in cells.items() if name not in records and fnmatch.fnmatchcase(name, only)]


def work_on(protocol: Protocol, work: Path, only: str = "*") -> None:
    """Run cells until none is left that matches `only`; another process may do the same in the same folder."""
    import torch

    from tests.benchmarks.cells import describe, run_cell
    from tests.benchmarks.preparation import Preparation

    torch.set_num_threads(1)
    records: dict[str, dict[str, Any]] = {}

    def take(cell: Cell) -> bool:
        """Run the cell, unless another process is at it or at its preparation."""
        with lock(work / "locks" / cell.name) as free:
            if not free or (work / "cells" / f"{cell.name}.json").exists():
                return False
            prepared = Preparation(work, cell.gold, cell.seed)
            if not prepared.done:
                with lock(prepared.common / "lock") as free:
                    if not free:
                        return False
                    started = time.monotonic()
                    prepared.make(protocol)
                    _say(f"prepared {cell.gold}/seed{cell.seed}, {time.monotonic() - started:.0f} s")
            record = run_cell(cell, protocol, work)
            write_json(work / "cells" / f"{cell.name}.json", record)
            _say(f"{cell.name}: {describe(record)}, {record['seconds']['all']:.0f} s")
            return True

    while True:
        records = read_cells(work, records)
        cells = open_cells(protocol, records, only)
        if not cells:
            return
        if not any(take(cell) for cell in cells):
            time.sleep(1.0)  # others are at all of them, and may open new ones


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
