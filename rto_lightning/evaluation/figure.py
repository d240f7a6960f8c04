"""Win rates as a picture."""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

from rto_lightning.evaluation.win_rates import ModelResult, WinRate
from rto_lightning.figures import COLOURS, MARKERS, new_figure
from rto_lightning.runs.files import written_whole

MOST_CATEGORIES = 30
"""Of more, none is drawn."""


def save_figure(path: Path, results: Sequence[ModelResult]) -> None:
    """Draws win rates with their intervals, over all prompts and by category, as a PNG.

    Args:
        path: the file.
        results: models, each against its baseline. Where they have several baselines or judges, the legend names them.
    """
    categories = sorted({name for result in results for name in result.categories})
    categories = categories if len(categories) <= MOST_CATEGORIES else []
    rows = ["all prompts", *categories]
    height = 1.6 + 0.3 * len(rows) * max(len(results), 2) ** 0.5
    figure = new_figure(8.0, height)
    axes = figure.add_subplot()
    axes.axvline(50.0, color="0.6", linewidth=1.0, linestyle="--", zorder=0)
    against = [
        f"against {result.baseline} ({result.baseline_characters:.0f} characters), judge: {result.judge}"
        for result in results
    ]
    are_alike = len(set(against)) == 1
    for number, result in enumerate(results):
        details = "" if are_alike else f", {against[number]}"
        places = [row + 0.6 * ((number + 0.5) / len(results) - 0.5) for row in range(len(rows))]
        rates = [result.overall, *(result.categories.get(name) for name in categories)]
        shown = [(place, rate) for place, rate in zip(places, rates, strict=True) if rate is not None]
        axes.errorbar(
            [rate.percent for _, rate in shown],
            [place for place, _ in shown],
            xerr=list(zip(*(_arms(rate) for _, rate in shown), strict=True)),
            fmt=MARKERS[number % len(MARKERS)],
            color=COLOURS[number % len(COLOURS)],
            capsize=3,
            label=_plain(f"{result.model} ({result.characters:.0f} characters){details}"),
        )
    axes.set(xlim=(-2.0, 102.0), ylim=(len(rows) - 0.5, -0.5), yticks=range(len(rows)), yticklabels=map(_plain, rows))
    axes.set_xlabel(_plain(f"win rate in percent, 95% interval{f'; {against[0]}' if are_alike else ''}"))
    axes.xaxis.label.set_wrap(True)
    axes.grid(axis="x", color="0.92")
    axes.legend(loc="best", fontsize=8)
    with written_whole(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # of a name in another script
        figure.savefig(file, format="png")


def _plain(name: str) -> str:
    """A name that matplotlib shows as it is: no formula between `$`, and in the legend whatever it begins with."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _arms(rate: WinRate) -> tuple[float, float]:
    """Lengths of the two halves of an interval; none where it is not known."""
    below, above = rate.percent - rate.low, rate.high - rate.percent
    return (0.0, 0.0) if math.isnan(below + above) else (below, above)
