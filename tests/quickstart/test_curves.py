"""Over-optimization and the picture of learning curves. Reading them is in `test_stages.py`."""

import math
import random
from pathlib import Path

import matplotlib.colors
import matplotlib.image
import numpy

from rto_lightning.quickstart.curves import over_optimization, plot_learning_curves


def curve(gold: list[float], score: list[float]) -> list[dict[str, float]]:
    pairs = zip(gold, score, strict=True)
    return [{"iteration": i, "gold": g, "score": s, "kl": 0.1 * i} for i, (g, s) in enumerate(pairs)]


def test_over_optimization_is_told() -> None:
    rising = [0.1 * i for i in range(40)]
    hump = [min(i, 40 - i) * 0.1 for i in range(40)]
    message = over_optimization(curve(hump, rising))
    assert message is not None and message.startswith("over-optimization: since iteration 20")
    assert over_optimization(curve(rising, rising)) is None
    # The gold reward fell, but so did the score: that is another trouble.
    assert over_optimization(curve(hump, hump)) is None
    # A policy that only ever got worse while the score rose: hacked from the start.
    assert over_optimization(curve([-value for value in rising], rising)) is not None


def test_noise_is_not_over_optimization() -> None:
    noisy = [1.0 + (0.3 if i % 2 else -0.3) for i in range(40)]
    assert over_optimization(curve(noisy, [0.01 * i for i in range(40)])) is None
    assert over_optimization(curve([1.0, 0.0], [0.0, 1.0])) is None
    rng = random.Random(0)
    for _ in range(20):
        flat = curve([rng.gauss(0.6, 0.12) for _ in range(60)], [rng.gauss(0.6, 0.06) for _ in range(60)])
        assert over_optimization(flat) is None


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
