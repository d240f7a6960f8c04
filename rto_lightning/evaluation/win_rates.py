"""Win rates with their uncertainty, over a benchmark and over its parts."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from rto_lightning.algorithms import clustered_mean_interval
from rto_lightning.evaluation.answers import Comparison
from rto_lightning.evaluation.judging import Judgment


@dataclass(frozen=True)
class WinRate:
    """How often a model wins; in percent of the games, ties as half."""

    percent: float
    """nan if nothing was judged."""
    low: float
    """End of the 95% interval, see :func:`win_rate`; nan with fewer than two prompts."""
    high: float
    standard_error: float
    wins: int
    """Prompts of whose games the model won more than half."""
    losses: int
    ties: int
    unjudged: int
    """Prompts without a game, which count nowhere else."""

    def summary(self) -> dict[str, float | None]:
        """All fields, for JSON, with None for nan."""
        return {name: None if math.isnan(value) else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class ModelResult:
    """A model against the baseline."""

    model: str
    baseline: str
    judge: str
    comparisons: list[Comparison]
    judgments: list[Judgment]
    """One for each comparison."""
    overall: WinRate
    categories: dict[str, WinRate]
    """By the parts of the benchmark, by their names; empty where there is only one."""
    characters: float
    """Mean length of the model's answers."""
    baseline_characters: float
    length_controlled: dict[str, float] = field(default_factory=dict)
    """What `alpaca_eval` says, under its names; empty where it was not asked."""

    @property
    def problems(self) -> dict[str, str]:
        """Why comparisons are unjudged, by their ids."""
        pairs = zip(self.comparisons, self.judgments, strict=True)
        return {comparison.id: judgment.problem for comparison, judgment in pairs if not judgment.games}

    def summary(self) -> dict[str, Any]:
        """Everything but the answers themselves, for JSON."""
        return {
            "model": self.model,
            "baseline": self.baseline,
            "judge": self.judge,
            "win_rate": self.overall.summary(),
            **({"length_controlled": self.length_controlled} if self.length_controlled else {}),
            "characters": self.characters,
            "baseline_characters": self.baseline_characters,
            "categories": {name: rate.summary() for name, rate in self.categories.items()},
            "unjudged": self.problems,
        }


def win_rate(judgments: Sequence[Judgment]) -> WinRate:
    """The win rate over some prompts, one judgment each.

    With one game a prompt, percentage and standard error are `alpaca_eval`'s. Several games of a prompt, such as those
    of Arena-Hard, are no independent observations; see :func:`clustered_mean_interval`. The interval is Wilson's with
    the effective number of prompts (Korn and Graubard, "Confidence intervals for proportions with small expected
    number of positive counts estimated from survey data", 1998; Brown, Cai and DasGupta, "Interval estimation for a
    binomial proportion", 2001): it stays within 0 and 100, and has a width when a model wins, or loses, every time.
    """
    judged = [judgment.games for judgment in judgments if judgment.games]
    means = [sum(games) / len(games) for games in judged]
    percent = low = high = error = float("nan")
    if judged:
        games = torch.tensor([game for row in judged for game in row], dtype=torch.float64)
        prompts = torch.tensor([number for number, row in enumerate(judged) for _ in row])
        share, _, above = (float(value) for value in clustered_mean_interval(games, prompts, z=1.0))
        percent, error = 100.0 * share, 100.0 * (above - share)
        low, high = (100.0 * end for end in _wilson(share, above - share, len(judged)))
    wins, losses = sum(mean > 0.5 for mean in means), sum(mean < 0.5 for mean in means)
    return WinRate(
        percent,
        low,
        high,
        error,
        wins,
        losses,
        len(means) - wins - losses,
        len(judgments) - len(judged),
    )


def _wilson(share: float, error: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Ends of an interval for a share whose standard error is known.

    Args:
        share: between 0 and 1.
        error: its standard error; nan gives no interval.
        count: observations, which are as many as they seem where they say nothing of their variance.
        z: half width in standard errors.
    """
    variance = share * (1.0 - share)
    if math.isnan(error):
        return math.nan, math.nan
    if variance > 0.0 and error == 0.0:  # every prompt has the same part of a win, such as a tie
        return share, share
    effective = count if variance <= 0.0 else variance / error**2
    middle = (share + z**2 / (2 * effective)) / (1 + z**2 / effective)
    half = z / (1 + z**2 / effective) * math.sqrt(max(variance, 0.0) / effective + z**2 / (4 * effective**2))
    return min(max(middle - half, 0.0), share), max(min(middle + half, 1.0), share)  # but for rounding


def model_result(
    model: str, baseline: str, judge: str, comparisons: list[Comparison], judgments: list[Judgment]
) -> ModelResult:
    """All figures of a model but the length-controlled one, from one judgment for each comparison."""
    parts: dict[str, list[Judgment]] = {}
    for comparison, judgment in zip(comparisons, judgments, strict=True):
        parts.setdefault(comparison.category, []).append(judgment)
    named = sorted(parts) if len(parts) > 1 else []
    return ModelResult(
        model,
        baseline,
        judge,
        comparisons,
        judgments,
        win_rate(judgments),
        {name or "(none)": win_rate(parts[name]) for name in named},
        sum(len(comparison.answer) for comparison in comparisons) / len(comparisons),
        sum(len(comparison.baseline) for comparison in comparisons) / len(comparisons),
    )
