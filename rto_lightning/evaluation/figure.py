"""Win rates as a picture."""

import math
from collections.abc import Sequence
from pathlib import Path

from rto_lightning.evaluation.win_rates import ModelResult, WinRate
from rto_lightning.runs.files import written_whole

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Of Okabe and Ito, which the colour-blind tell apart."""

MOST_CATEGORIES = 30
"""Of more, none is drawn."""


def save_figure(path: Path, results: Sequence[ModelResult]) -> None:
    """Draws win rates with their intervals, over all prompts and by category, as a PNG.

    Args:
        path: the file.
        results: models against the same baseline.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    categories = sorted({name for result in results for name in result.categories})
    categories = categories if len(categories) <= MOST_CATEGORIES else []
    rows = ["all prompts", *categories]
    height = 1.6 + 0.3 * len(rows) * max(len(results), 2) ** 0.5
    figure = Figure(figsize=(8.0, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axvline(50.0, color="0.6", linewidth=1.0, linestyle="--", zorder=0)
    for number, result in enumerate(results):
        places = [row + 0.6 * ((number + 0.5) / len(results) - 0.5) for row in range(len(rows))]
        rates = [result.overall, *(result.categories.get(name) for name in categories)]
        shown = [(place, rate) for place, rate in zip(places, rates, strict=True) if rate is not None]
        axes.errorbar(
            [rate.percent for _, rate in shown],
            [place for place, _ in shown],
            xerr=list(zip(*(_arms(rate) for _, rate in shown), strict=True)),
            fmt="os^Dv<"[number % 6],
            color=_COLOURS[number % len(_COLOURS)],
            capsize=3,
            label=f"{result.model} ({result.characters:.0f} characters)",
        )
    axes.set(xlim=(-2.0, 102.0), ylim=(len(rows) - 0.5, -0.5), yticks=range(len(rows)), yticklabels=rows)
    baseline = results[0]
    axes.set_xlabel(
        f"win rate against {baseline.baseline} ({baseline.baseline_characters:.0f} characters) in percent, "
        f"95% interval; judge: {baseline.judge}"
    )
    axes.xaxis.label.set_wrap(True)
    axes.grid(axis="x", color="0.92")
    axes.legend(loc="best", fontsize=8)
    with written_whole(path) as file:
        figure.savefig(file, format="png")


def _arms(rate: WinRate) -> tuple[float, float]:
    """Lengths of the two halves of an interval; none where it is not known."""
    below, above = rate.percent - rate.low, rate.high - rate.percent
    return (0.0, 0.0) if math.isnan(below + above) else (below, above)
