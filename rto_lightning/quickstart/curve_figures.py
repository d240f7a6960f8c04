"""Pictures of learning curves: against iterations or samples, and the reward that each run has at which KL."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rto_lightning.figures import line_look, moving_average, new_figure
from rto_lightning.quickstart.curves import finite_records, smoothed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_REWARDS = (
    ("gold", "gold reward", "gold reward (mean a response)"),
    ("score", "reward-model score", "score (mean a response, r.m. units)"),
)
_KL = ("kl", "distance from the reference", "KL (nats a response)")
_AGAINST = {"iteration": "PPO iteration", "samples": "sampled answers"}


def plot_learning_curves(
    path: str | Path,
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    gold_levels: Mapping[str, float] | None = None,
) -> None:
    """Draw learning curves against iterations by :func:`draw_learning_curves`, and write a PNG.

    Args:
        path: file to write, over an old one.
        curves: for each run its records; a record may lack a quantity or hold nan for it.
        gold_levels: horizontal lines in the gold panel, such as the SFT and the DPO policy.
    """
    figure = new_figure(11.0, 4.6 if len(curves) > 4 else 3.6)
    draw_learning_curves(figure, curves, gold_levels)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def draw_learning_curves(
    figure: "Figure",
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    gold_levels: Mapping[str, float] | None = None,
    against: Literal["iteration", "samples"] = "iteration",
) -> None:
    """Draw gold reward, reward-model score and KL in three panels, one line a run.

    More than four runs are drawn as moving averages over five iterations, since their noise would hide one another.

    Args:
        figure: an empty figure, about three times as wide as high.
        curves: for each run its records; a record may lack a quantity or hold nan for it.
        gold_levels: horizontal lines in the gold panel, such as the SFT and the DPO policy.
        against: what the horizontal axis counts.
    """
    many = len(curves) > 4
    panels = (*_REWARDS, _KL)
    axes = figure.subplots(1, len(panels))
    for axis, (key, title, label) in zip(axes, panels, strict=True):
        for number, (name, curve) in enumerate(curves.items()):
            points = finite_records(curve, key, against)
            window = min(5, max(1, len(points))) if many else 1
            axis.plot(
                moving_average([point[against] for point in points], window),
                moving_average([point[key] for point in points], window),
                label=name,
                linewidth=1.8,
                markersize=4.5,
                markevery=max(1, len(points) // 8),
                **line_look(number),
            )
        _label(axis, title, _AGAINST[against], label)
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


def draw_frontier(
    figure: "Figure",
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    gold_points: Mapping[str, tuple[float, float]] | None = None,
    window: int = 5,
) -> None:
    """Draw which gold reward and which score a run has at which KL: what it pays for its reward.

    Each iteration is a pale dot, their moving averages a line with a mark at its end.

    Args:
        figure: an empty figure, about twice as wide as high.
        curves: for each run its records, in the order of iterations.
        gold_points: policies in the gold panel that have no curve, as (KL, gold reward).
        window: iterations in a moving average.
    """
    axes = figure.subplots(1, len(_REWARDS))
    for axis, (key, title, label) in zip(axes, _REWARDS, strict=True):
        for number, (name, curve) in enumerate(curves.items()):
            points = finite_records(curve, key, "kl")
            rewards = [point[key] for point in smoothed(points, key, window)]
            distances = [point["kl"] for point in smoothed(points, "kl", window)]
            line = line_look(number)
            axis.scatter(
                [point["kl"] for point in points],
                [point[key] for point in points],
                s=14,
                alpha=0.3,
                linewidths=0,
                color=line["color"],
                marker=line["marker"],
            )
            axis.plot(distances, rewards, label=name, linewidth=1.8, markersize=7, markevery=[-1], **line)
        _label(axis, f"{title} against distance", _KL[2], label)
    for name, (distance, reward) in (gold_points or {}).items():
        axes[0].plot(distance, reward, "*", color="0.35", markersize=10)
        axes[0].annotate(
            name, (distance, reward), xytext=(6, -10), textcoords="offset points", fontsize=9, color="0.35"
        )
    axes[0].legend(frameon=False, loc="lower right")


def _label(axis: Any, title: str, horizontal: str, vertical: str) -> None:
    axis.set_title(title, fontsize=11)
    axis.set_xlabel(horizontal)
    axis.set_ylabel(vertical)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
