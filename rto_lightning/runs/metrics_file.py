"""Metrics as `metrics.csv`, of which a run that was killed and goes on has each row once."""

import csv
import re
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from rto_lightning.runs.files import check_room, written_whole

FILE = "metrics.csv"


class MetricsFileLogger(CSVLogger):
    """As Lightning's CSVLogger, but each row is written when it is logged, and a resumed run appends to its file.

    Args:
        save_dir: Folder of the runs.
        version: Name of this run, its folder there.
        resume_at: Optimizer steps that the checkpoint has behind it which the run goes on from: rows of later ones are
            dropped, since the run makes them again. None begins the file anew.
    """

    def __init__(self, save_dir: str | Path, version: str, resume_at: int | None = None) -> None:
        super().__init__(save_dir, name="", version=version)
        self.path = Path(self.log_dir) / FILE
        self._columns: list[str] = []
        self._resume_at = resume_at
        self._opened = False

    @property
    def experiment(self) -> None:
        """Nothing: rows go to the file."""

    @rank_zero_only
    def log_hyperparams(self, params: Any = None, *args: Any, **kwargs: Any) -> None:
        """Nothing: `config.yaml` has the settings."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Adds a row.

        Args:
            metrics: numbers by their names.
            step: optimizer steps before the one that is logged.

        Raises:
            UserError: if the disk is full.
        """
        row = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}
        row["step"] = step if step is not None else 0
        try:
            if not self._opened:
                self._open()
            if set(row) <= set(self._columns):
                with self.path.open("a", encoding="utf-8", newline="") as file:
                    csv.DictWriter(file, self._columns).writerow(row)
            else:
                self._write([*self._rows(), row])
        except OSError as error:
            check_room(error, self.path)
            raise

    def save(self) -> None:
        """Nothing: every row is in the file."""

    def finalize(self, status: str) -> None:
        """Nothing either."""

    def _open(self) -> None:
        self._opened = True
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [] if self._resume_at is None else [row for row in self._rows() if int(row["step"]) < self._resume_at]
        self._write(kept)

    def _rows(self) -> list[dict[str, Any]]:
        return _read(self.path) if self.path.exists() else []

    def _write(self, rows: list[dict[str, Any]]) -> None:
        names = set().union(*rows) | {"step"}
        self._columns = sorted(names)
        with written_whole(self.path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)


def read_metrics(folder: str | Path, command: str = "fit") -> list[dict[str, str]]:
    """The rows that the last run of a command has logged in a stage's folder, as text; empty where one has no value.

    Args:
        folder: of the stage.
        command: `fit`, `validate` or `test`.

    Returns:
        No rows if nothing was logged.
    """
    logged = {}
    for path in (Path(folder) / "metrics").glob(f"{command}*/{FILE}"):
        if match := re.fullmatch(rf"{command}(?:-(\d+))?", path.parent.name):
            logged[int(match[1] or 1)] = path
    return _read(logged[max(logged)]) if logged else []


def _read(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    # A process that died while it wrote a row may have left half of it.
    return [row for row in rows if None not in row and str(row.get("step", "")).isdigit()]
