"""The arithmetic of the benchmark: how soon a curve reaches a level, gold reward at equal KL, intervals over seeds."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

WINDOW = 5
"""Iterations in a trailing mean; one iteration's gold reward is too noisy to tell when a level is reached."""

_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Quantiles of Student's t at 97.5%, for 1 to 9 degrees of freedom."""

Curve = Sequence[float | None]
"""A quantity of each iteration; None where it was not finite."""
Run = Mapping[str, Any]
"""One seed of a method: `seed`, `error`, and unless it failed `curves` and `test`."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95% interval by Student's t."""

    mean: float
    low: float | None
    """None for a single seed."""
    high: float | None
    n: int
    """Seeds."""


def interval(values: Sequence[float | None]) -> Interval | None:
    """Mean and interval over the seeds that have a value; None without any.

    Raises:
        ValueError: for more than ten seeds.
    """
    given = [value for value in values if value is not None]
    if not given:
        return None
    mean, n = statistics.fmean(given), len(given)
    if n == 1:
        return Interval(mean, None, None, 1)
    if n > len(_T_975) + 1:
        raise ValueError(f"There is no t quantile for {n} seeds; extend the table.")
    half = _T_975[n - 2] * statistics.stdev(given) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def trailing_means(curve: Curve, window: int = WINDOW) -> list[float | None]:
    """Mean of each iteration and those before it, `window` in all; None before that many, or if one is None."""
    means: list[float | None] = []
    for end in range(1, len(curve) + 1):
        part = [value for value in curve[max(0, end - window) : end] if value is not None]
        means.append(statistics.fmean(part) if len(part) == window else None)
    return means


def share_to_reach(curve: Curve, level: float, window: int = WINDOW) -> float | None:
    """Share of the iterations after which the trailing mean first is at least `level`; None if it never is."""
    means = trailing_means(curve, window)
    return next((i / len(means) for i, mean in enumerate(means, start=1) if mean is not None and mean >= level), None)


def gold_at_kl(gold: Curve, kl: Curve, level: float, window: int = WINDOW) -> float | None:
    """Gold reward where the smoothed run first passes a KL, interpolated between iterations; None if it never does."""
    points = [
        (x, y)
        for x, y in zip(trailing_means(kl, window), trailing_means(gold, window), strict=True)
        if x is not None and y is not None
    ]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= level <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (level - x0) / (x1 - x0)
    return None


def method_summary(runs: Sequence[Run], baseline: Sequence[Run], window: int = WINDOW) -> dict[str, Any]:
    """One line of the table: a method's runs beside the baseline's of the same seeds.

    Args:
        runs: the method's runs, one a seed.
        baseline: PPO's.
        window: see `WINDOW`.

    Returns:
        Intervals (as dictionaries, or None) and counts. A run that never reaches the baseline's final gold reward, or
        failed, counts with a share of 1. A seed on which the baseline itself failed cannot be compared.
    """
    ends = {run["seed"]: _end(run, window) for run in baseline}
    own = {run["seed"]: _share(run, ends[run["seed"]], window) for run in baseline}
    share = {run["seed"]: _share(run, ends.get(run["seed"]), window) for run in runs}
    gold, baseline_gold = ({run["seed"]: _final(run, "gold") for run in group} for group in (runs, baseline))
    at_kl = {run["seed"]: _gold_at_end_kl(run, ends.get(run["seed"]), window) for run in runs}

    def over_seeds(function: Callable[..., float], *values: Mapping[int, Any]) -> dict[str, Any] | None:
        """Interval of a function of what each seed has, over the seeds that have it all."""
        rows = [[value.get(run["seed"]) for value in values] for run in runs]
        return _as_dict(interval([None if None in row else function(*row) for row in rows]))

    return {
        "runs": len(runs),
        "failed": sum(run["error"] is not None for run in runs),
        "diverged": sum(bool(run["diverged"]) for run in runs),
        "share": over_seeds(lambda ours: min(ours, 1.0), share),
        "reached": sum(value is not None and value <= 1.0 for value in share.values()),
        "share_ratio": over_seeds(lambda ours, theirs: min(ours, 1.0) / min(theirs, 1.0), share, own),
        "gold_difference": over_seeds(lambda ours, theirs: ours - theirs, gold, baseline_gold),
        "gold_at_kl": over_seeds(lambda ours: ours, at_kl),
        "gold_at_kl_difference": over_seeds(lambda ours, end: ours - end[0], at_kl, ends),
        **final_summary(runs),
    }


def final_summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Gold reward, KL and length of answers to test prompts, over seeds."""
    return {name: _as_dict(interval([_final(run, name) for run in runs])) for name in ("gold", "kl", "length")}


def _as_dict(result: Interval | None) -> dict[str, Any] | None:
    return None if result is None else asdict(result)


def _final(run: Run, name: str) -> float | None:
    return None if run["error"] is not None else run["test"][name]


def _end(run: Run, window: int) -> tuple[float, float] | None:
    """Gold reward and KL of a run's last iterations."""
    if run["error"] is not None:
        return None
    gold, kl = (trailing_means(run["curves"][name], window)[-1] for name in ("gold", "kl"))
    return None if gold is None or kl is None else (gold, kl)


def _share(run: Run, end: tuple[float, float] | None, window: int) -> float | None:
    """Share of the iterations to the baseline's end, infinite if never reached; None without such an end."""
    if end is None:
        return None
    share = None if run["error"] is not None else share_to_reach(run["curves"]["gold"], end[0], window)
    return math.inf if share is None else share


def _gold_at_end_kl(run: Run, end: tuple[float, float] | None, window: int) -> float | None:
    if end is None or run["error"] is not None:
        return None
    return gold_at_kl(run["curves"]["gold"], run["curves"]["kl"], end[1], window)
