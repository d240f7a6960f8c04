"""Learning curves of RTO and PPO runs: reading, and what they say. Drawing them is in `curve_figures.py`.

The functions on records take plain lists, so that they serve a notebook as well.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from rto_lightning.figures import moving_average
from rto_lightning.runs.folder import config_files
from rto_lightning.runs.metrics_file import read_metrics


def read_curve(folder: str) -> list[dict[str, float]]:
    """Gold reward, score and KL of each iteration, from the metrics that an RTO or PPO stage logged last.

    Args:
        folder: the stage's folder.

    Returns:
        A record for each iteration, without what the stage does not log; none if it logged no gold reward. `samples`
        are the answers that were sampled until its end; it is there if the folder has the stage's settings.
    """
    rows = [row for row in read_metrics(folder) if row.get("train/gold")]
    if not rows:
        return []
    names = {"gold": "train/gold", "score": "train/score", "kl": "train/kl"}
    samples = _samples_per_iteration(Path(folder))
    curve = []
    for row in rows:
        iteration = float(row["step"]) + 1
        counts = (
            {"iteration": iteration} if samples is None else {"iteration": iteration, "samples": iteration * samples}
        )
        curve.append({**counts, **{key: float(row[name]) for key, name in names.items() if row.get(name)}})
    return curve


def _samples_per_iteration(folder: Path) -> int | None:
    files = config_files(folder)
    if not files:
        return None
    settings = yaml.safe_load(files[-1].read_text(encoding="utf-8"))
    prompts: int = settings["data"]["init_args"]["batch_size"]
    responses: int = settings["model"]["init_args"]["rollout"]["responses_per_prompt"]
    return prompts * responses


def over_optimization(
    curve: Sequence[Mapping[str, float]],
    window: int = 5,
    tolerance: float = 0.1,
) -> str | None:
    """Say whether a run won reward-model score while it lost gold reward, and None if it did not.

    Both are smoothed by a moving average. Over-optimization is a fall of the gold reward, from its best to the
    end, by more than `tolerance` of what was won until then, while the score rose over the same iterations, both
    by more than their noise. A gold reward that only ever fell has its best at the start, and counts as well.

    Args:
        curve: records with the iteration, the gold reward and the score.
        window: iterations in the moving average.
        tolerance: fraction of the gain that may be lost again.
    """
    points = finite_records(curve, "gold", "score")
    if len(points) < 2 * window:
        return None
    gold = moving_average([point["gold"] for point in points], window)
    score = moving_average([point["score"] for point in points], window)
    # Four standard errors of an average: the peak is the best of many, and so partly luck.
    gold_noise = 4.0 * _noise([point["gold"] for point in points]) / math.sqrt(window)
    score_noise = 4.0 * _noise([point["score"] for point in points]) / math.sqrt(window)
    peak = max(range(len(gold)), key=gold.__getitem__)
    lost, won = gold[peak] - gold[-1], score[-1] - score[peak]
    if lost <= max(tolerance * (gold[peak] - gold[0]), gold_noise) or won <= score_noise:
        return None
    iteration = points[min(peak + window // 2, len(points) - 1)]["iteration"]
    return (
        f"over-optimization: since iteration {iteration:.0f} the reward model's score rose from "
        f"{score[peak]:.2f} to {score[-1]:.2f} while the gold reward fell from {gold[peak]:.2f} to {gold[-1]:.2f}"
    )


def smoothed(curve: Sequence[Mapping[str, float]], quantity: str, window: int = 5) -> list[dict[str, float]]:
    """A quantity as moving averages, of the iterations that have it and as many as `window`, with where they end.

    Args:
        curve: records as of `read_curve`.
        quantity: `gold`, `score` or `kl`.
        window: iterations in an average; records of the first ones, which have no whole window, are left out.

    Returns:
        Records of the last iteration of each window, with the average in the place of the quantity.
    """
    points = finite_records(curve, quantity)
    averages = moving_average([point[quantity] for point in points], window)
    return [{**point, quantity: mean} for point, mean in zip(points[window - 1 :], averages, strict=True)]


def first_to_reach(
    curve: Sequence[Mapping[str, float]], quantity: str, level: float, window: int = 5
) -> dict[str, float] | None:
    """The first record of :func:`smoothed` whose quantity is at least `level`; None if there is none."""
    return next((record for record in smoothed(curve, quantity, window) if record[quantity] >= level), None)


def finite_records(curve: Sequence[Mapping[str, float]], *quantities: str) -> list[Mapping[str, float]]:
    """The records that have all these quantities, with numbers that are finite."""
    return [record for record in curve if all(math.isfinite(record.get(name, math.nan)) for name in quantities)]


def _noise(values: Sequence[float]) -> float:
    """Standard deviation of one value about a smooth curve, from second differences."""
    second = [values[i - 1] - 2.0 * values[i] + values[i + 1] for i in range(1, len(values) - 1)]
    return math.sqrt(statistics.fmean([value * value for value in second]) / 6.0) if second else 0.0
