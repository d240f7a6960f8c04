"""What the stages logged, and which of it a report shows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rto_lightning.runs.metrics_file import read_metrics


@dataclass(frozen=True)
class Series:
    """N values of one quantity of a run."""

    steps: list[float]
    """Optimizer steps before each (iterations for RTO)."""
    values: list[float]
    """The values, all finite."""

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class Quantity:
    """One that a report shows."""

    name: str
    """Without `train/` or `validation/`."""
    title: str
    """Over its chart and its column."""
    unit: str
    """Beside the axis."""


@dataclass(frozen=True)
class Kind:
    """A kind of stage."""

    title: str
    """Over its charts."""
    mark: str
    """A quantity that every stage of this kind logs, and no stage of the kinds after it."""
    quantities: tuple[Quantity, ...]
    """What is shown of it."""


KINDS = (
    Kind(
        "RTO and PPO",
        "kl",
        (
            Quantity("gold", "Gold reward", "mean of a response"),
            Quantity("score", "Score", "mean of a response"),
            Quantity("reward/total", "Reward, all terms", "mean of a response"),
            Quantity("reward/token", "Token rewards", "mean sum over a response"),
            Quantity("kl", "KL from the reference", "nats a response"),
            Quantity("entropy", "Entropy", "nats a token"),
            Quantity("response/length", "Length of responses", "tokens"),
            Quantity("response/truncated", "Truncated responses", "share"),
        ),
    ),
    Kind(
        "Preferences",
        "reward_chosen",
        (
            Quantity("loss", "Loss", "mean of a pair"),
            Quantity("accuracy", "Pairs ranked as labelled", "share"),
            Quantity("margin", "Margin", "implicit reward, chosen minus rejected"),
        ),
    ),
    Kind(
        "Reward model",
        "score_chosen",
        (
            Quantity("loss", "Loss", "mean of a pair"),
            Quantity("accuracy", "Pairs ranked as labelled", "share"),
            Quantity("margin", "Margin", "score, chosen minus rejected"),
        ),
    ),
    Kind("Supervised fine-tuning", "loss", (Quantity("loss", "Loss", "nats a token"),)),
)
"""In the order in which they are shown; a stage is of the first kind whose mark it has."""


class Run:
    """The metrics of a stage's last training.

    Args:
        rows: of its `metrics.csv`.
    """

    def __init__(self, rows: Sequence[Mapping[str, str]]) -> None:
        self._rows = rows
        names = set().union(*rows)
        self.kind = next((kind for kind in KINDS if f"train/{kind.mark}" in names), None)
        """Which quantities it has; None for a stage that logs others."""

    def series(self, name: str) -> Series:
        """The finite values of a column, in the order of steps."""
        found = [(float(row["step"]), float(row[name])) for row in self._rows if row.get(name)]
        found = sorted(pair for pair in found if math.isfinite(pair[1]))
        return Series([step for step, _ in found], [value for _, value in found])


def read_run(folder: Path) -> Run | None:
    """The metrics that a stage logged in its last training; None if it logged none."""
    rows = read_metrics(folder)
    return Run(rows) if rows else None


def first_and_last(series: Series) -> tuple[float, float]:
    """Means over the first and the last tenth of a run, of at least one value each.

    >>> first_and_last(Series([0.0, 1.0, 2.0], [1.0, 5.0, 3.0]))
    (1.0, 3.0)
    """
    part = max(1, len(series) // 10)
    first, last = series.values[:part], series.values[-part:]
    return math.fsum(first) / part, math.fsum(last) / part
