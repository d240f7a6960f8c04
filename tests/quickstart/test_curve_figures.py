"""The pictures of learning curves."""

import math
from pathlib import Path

import matplotlib.colors
import matplotlib.image
import numpy
import pytest
from matplotlib.figure import Figure

from rto_lightning.quickstart.curve_figures import draw_frontier, draw_learning_curves, plot_learning_curves
from tests.quickstart.test_curves import curve


def test_learning_curves_are_a_png(tmp_path: Path) -> None:
    path = tmp_path / "plots" / "curves.png"
    runs = {"PPO": curve([0.0, 1.0, 2.0], [0.0, 0.5, 1.0]), "RTO": curve([0.0, 2.0], [0.0, 1.0])}
    runs["RTO"].append({"iteration": 2, "gold": math.nan, "kl": 0.3})
    plot_learning_curves(path, runs, {"SFT": 0.1})
    assert path.read_bytes().startswith(b"\x89PNG")


def test_many_runs_have_a_legend_below_the_panels(tmp_path: Path) -> None:
    runs = {f"run {i}": curve([0.1 * i, 1.0 + 0.1 * i], [0.0, 0.1 * i]) for i in range(11)}
    plot_learning_curves(tmp_path / "many.png", runs)
    image = matplotlib.image.imread(tmp_path / "many.png")[..., :3]
    below = image[int(0.88 * len(image)) :]
    for colour in ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"):
        near = numpy.abs(below - matplotlib.colors.to_rgb(colour)).max(-1) < 0.02
        assert near.sum() > 10, f"{colour} is not in the legend"


def test_the_horizontal_axis_counts_what_is_asked_for() -> None:
    points = [{**point, "samples": 64 * (point["iteration"] + 1)} for point in curve([0.0, 1.0], [0.0, 0.5])]
    points.append({"iteration": 2, "gold": 5.0, "kl": 0.2})  # of unknown samples
    for against, values, label in (
        ("iteration", [0, 1, 2], "PPO iteration"),
        ("samples", [64, 128], "sampled answers"),
    ):
        figure = Figure()
        draw_learning_curves(figure, {"RTO": points}, against=against)
        gold = figure.axes[0]
        assert gold.get_xlabel() == label
        assert list(gold.lines[0].get_xdata()) == values
        assert [axis.get_title() for axis in figure.axes] == [
            "gold reward",
            "reward-model score",
            "distance from the reference",
        ]


def test_the_frontier_has_every_iteration_and_averages() -> None:
    figure = Figure()
    draw_frontier(figure, {"PPO": curve([0.0, 2.0, 4.0], [1.0, 2.0, 6.0])}, {"DPO": (3.0, 1.5)}, window=2)
    gold, score = figure.axes
    for axis, values in ((gold, [0.0, 2.0, 4.0]), (score, [1.0, 2.0, 6.0])):
        dots = axis.collections[0].get_offsets()
        assert dots[:, 0].tolist() == pytest.approx([0.0, 0.1, 0.2]) and dots[:, 1].tolist() == values
        assert axis.lines[0].get_xdata() == pytest.approx([0.05, 0.15])
    assert list(gold.lines[0].get_ydata()) == [1.0, 3.0] and list(score.lines[0].get_ydata()) == [1.5, 4.0]
    assert (gold.lines[1].get_xdata(), gold.lines[1].get_ydata()) == ([3.0], [1.5]) and len(score.lines) == 1
    assert [text.get_text() for text in gold.texts] == ["DPO"]
