"""Learning curves of RTO and PPO runs: reading, over-optimization, drawing.

The functions on records take plain lists, so that they serve a notebook as well.
"""

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path


def read_curve(folder: str) -> list[dict[str, float]]:
    """Gold reward, score and KL of each iteration, from the metrics that an RTO or PPO stage logged last.

    Args:
        folder: the stage's folder.

    Returns:
        A record for each iteration, without what the stage does not log; none if it logged no gold reward.
    """
    logged = sorted((Path(folder) / "metrics").glob("fit*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    if not logged:
        return []
    names = {"gold": "train/gold", "score": "train/score", "kl": "train/kl"}
    with logged[-1].open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/gold")]
    return [
        {"iteration": float(row["step"]) + 1, **{key: float(row[name]) for key, name in names.items() if row.get(name)}}
        for row in rows
    ]


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
    points = [record for record in curve if _finite(record, "gold") and _finite(record, "score")]
    if len(points) < 2 * window:
        return None
    gold = _moving_average([point["gold"] for point in points], window)
    score = _moving_average([point["score"] for point in points], window)
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


def _finite(record: Mapping[str, float], key: str) -> bool:
    value = record.get(key)
    return value is not None and math.isfinite(value)


def _moving_average(values: Sequence[float], window: int) -> list[float]:
    return [statistics.fmean(values[start : start + window]) for start in range(len(values) - window + 1)]


def _noise(values: Sequence[float]) -> float:
    """Standard deviation of one value about a smooth curve, from second differences."""
    second = [values[i - 1] - 2.0 * values[i] + values[i + 1] for i in range(1, len(values) - 1)]
    return math.sqrt(statistics.fmean([value * value for value in second]) / 6.0) if second else 0.0


# Okabe and Ito's palette, whose colours the colour-blind tell apart; dashes and markers say it once more. Their numbers
# have no common divisor, so that 28 runs have lines of their own.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v")


def plot_learning_curves(
    path: str | Path,
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    gold_levels: Mapping[str, float] | None = None,
) -> None:
    """Draw gold reward, reward-model score and KL against iterations, one line a run, and write a PNG.

    More than four runs are drawn as moving averages over five iterations, since their noise would hide one another.

    Args:
        path: file to write, over an old one.
        curves: for each run its records; a record may lack a quantity or hold nan for it.
        gold_levels: horizontal lines in the gold panel, such as the SFT and the DPO policy.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot no window system is needed, and no figure of the caller's is touched.
    many = len(curves) > 4
    figure = Figure(figsize=(11.0, 4.6 if many else 3.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        ("gold", "gold reward", "gold reward (mean a response)"),
        ("score", "reward-model score", "score (mean a response, r.m. units)"),
        ("kl", "distance from the reference", "KL (nats a response)"),
    )
    axes = figure.subplots(1, len(panels))
    for axis, (key, title, label) in zip(axes, panels, strict=True):
        for number, (name, curve) in enumerate(curves.items()):
            points = [record for record in curve if _finite(record, key)]
            window = min(5, max(1, len(points))) if many else 1
            axis.plot(
                _moving_average([point["iteration"] for point in points], window),
                _moving_average([point[key] for point in points], window),
                label=name,
                color=_COLOURS[number % len(_COLOURS)],
                linestyle=_DASHES[number % len(_DASHES)],
                marker=_MARKERS[number % len(_MARKERS)],
                linewidth=1.8,
                markersize=4.5,
                markevery=max(1, len(points) // 8),
            )
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("PPO iteration")
        axis.set_ylabel(label)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for level_name, level in (gold_levels or {}).items():
        axes[0].axhline(level, color="0.45", linewidth=1.0, linestyle=(0, (1, 2)))
        axes[0].annotate(
            level_name,
            (1.0, level),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 2),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=8,
            color="0.35",
        )
    axes[-1].set_ylim(bottom=min(0.0, axes[-1].get_ylim()[0]))
    if many:
        handles, names = axes[1].get_legend_handles_labels()
        figure.legend(handles, names, frameon=False, loc="outside lower center", ncols=6)
    else:
        axes[1].legend(frameon=False, loc="lower right")  # where rising curves leave room
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
