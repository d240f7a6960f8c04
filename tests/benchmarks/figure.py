"""The learning curves, from the kept document alone."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.summary import Interval, interval, trailing_means
from tests.benchmarks.tables import GOLDS

# Okabe and Ito's palette, which the colour-blind tell apart. A dashed line learns from the score alone, the solid line
# of the same colour from token rewards too.
STYLES: dict[str, dict[str, Any]] = {
    "ppo": {"color": "#000000", "linestyle": "--"},
    "rto": {"color": "#D55E00"},
    "rto_at_kl": {"color": "#D55E00", "linestyle": ":"},
    "semi_rto": {"color": "#E69F00"},
    "ddpo": {"color": "#56B4E9"},
    "rs_ppo": {"color": "#0072B2"},
    "reinforce_pp": {"color": "#009E73", "linestyle": "--"},
    "rto_reinforce_pp": {"color": "#009E73"},
    "rloo": {"color": "#F0E442", "linestyle": "--"},
    "rto_rloo": {"color": "#F0E442"},
    "grpo": {"color": "#CC79A7", "linestyle": "--"},
    "rto_grpo": {"color": "#CC79A7"},
}

KL_RANGE = 3.0
"""The KL axis ends at this many times PPO's last KL at most: a run that runs away must not hide the others."""


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Gold reward against responses and against KL, a row of panels for each gold reward."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    golds = document["golds"]
    figure = Figure(figsize=(11.5, 4.2 * len(golds)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(golds), 2, squeeze=False, sharey="row")
    for (left, right), (name, gold) in zip(panels, golds.items(), strict=True):
        far = math.inf
        for key, method in gold["methods"].items():
            reward, kl = (mean_curve(method["runs"], quantity, document["window"]) for quantity in ("gold", "kl"))
            used = [document["responses"] * (iteration + 1) for iteration in range(len(reward))]
            _line(left, used, reward, method["title"], STYLES[key], band=key in ("ppo", "rto"))
            _line(right, [point and point.mean for point in kl], reward, method["title"], STYLES[key], band=False)
            if key == "ppo" and reward and reward[-1] is not None and kl[-1] is not None:
                for axis in (left, right):
                    axis.axhline(reward[-1].mean, color="0.4", linewidth=1.0, linestyle=":")
                far = KL_RANGE * kl[-1].mean
        right.set_xlim(0.0, min(max(far, 0.1), right.get_xlim()[1]))
        left.set(xlabel="sampled responses", ylabel="gold reward of an answer", title=GOLDS[name])
        right.set(xlabel=f"KL to the reference, nats (at most {KL_RANGE:.0f} times PPO's)", title="Against KL")
        for axis in (left, right):
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.savefig(path)


def mean_curve(runs: Sequence[Mapping[str, Any]], name: str, window: int) -> list[Interval | None]:
    """Mean and interval over seeds of a smoothed quantity at each iteration; None where a seed has none."""
    curves = [trailing_means(run["curves"][name], window) for run in runs if run["error"] is None]
    return [None if None in values else interval(values) for values in zip(*curves, strict=True)]


def _line(axis: Any, x: Sequence[Any], y: Sequence[Interval | None], label: str, style: Any, band: bool) -> None:
    points = [(at, value) for at, value in zip(x, y, strict=True) if at is not None and value is not None]
    if not points:
        return
    at = [point for point, _ in points]
    axis.plot(at, [value.mean for _, value in points], label=label, linewidth=1.9, **style)
    if band and points[0][1].low is not None:
        low, high = [value.low for _, value in points], [value.high for _, value in points]
        axis.fill_between(at, low, high, color=style["color"], alpha=0.15, linewidth=0)
