"""Curves over the steps of a run, and the frontier of KL and reward."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rto_lightning.figures import line_look, moving_average, new_figure
from rto_lightning.report.metrics import Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[float, float]
"""KL divergence from the reference, nats a response, and reward of a response."""

_WIDTH, _HEIGHT = 4.8, 3.2
_SHOWN = 50
"""Of a longer run means over windows are drawn, so that about as many points differ."""


def curve_figure(runs: Mapping[str, tuple[Series, Series]], unit: str) -> "Figure":
    """One quantity of several runs against their steps: lines for training, crosses for validation.

    Args:
        runs: for each name what was logged in training and in validation; one of them may be empty.
        unit: what stands beside the axis.
    """
    figure = new_figure(_WIDTH, _HEIGHT)
    axes: Axes = figure.add_subplot()
    validated = False
    for number, (name, (train, validation)) in enumerate(runs.items()):
        look = line_look(number)
        window = max(1, len(train) // _SHOWN)
        steps, values = (moving_average(numbers, window) for numbers in (train.steps, train.values))
        axes.plot(steps, values, label=name, linewidth=1.8, markersize=4, markevery=max(1, len(steps) // 8), **look)
        if len(validation):
            validated = True
            axes.plot(validation.steps, validation.values, "x:", color=look["color"], markersize=7, linewidth=1.0)
    axes.set_xlabel("step" + (" (crosses: validation)" if validated else ""))
    axes.set_ylabel(unit)
    _finish(axes, len(runs) > 1)
    return figure


def frontier_figure(runs: Mapping[str, Sequence[Point]], label: str) -> "Figure":
    """Reward against KL of each run, from its first iteration (a ring) to its last (a square).

    Args:
        runs: for each name its iterations in their order; of a single one the name is not shown.
        label: what the reward is.
    """
    figure = new_figure(_WIDTH, _HEIGHT)
    axes: Axes = figure.add_subplot()
    for number, (name, points) in enumerate(runs.items()):
        look = line_look(number) | {"marker": ""}
        window = max(1, len(points) // _SHOWN)
        kl, reward = (moving_average(list(numbers), window) for numbers in zip(*points, strict=True))
        axes.plot(kl, reward, label=name, linewidth=1.6, **look)
        axes.plot(kl[0], reward[0], "o", color=look["color"], markerfacecolor="white", markersize=7)
        axes.plot(kl[-1], reward[-1], "s", color=look["color"], markersize=7)
    axes.set_xlabel("KL from the reference (nats a response)")
    axes.set_ylabel(label)
    _finish(axes, len(runs) > 1)
    return figure


def _finish(axes: "Axes", with_legend: bool) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if with_legend:
        axes.legend(frameon=False, fontsize=8, loc="best")
