"""What all figures share: looks that the colour-blind tell apart, and drawing without a window system."""

import io
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

# Okabe and Ito's palette; dashes and markers say it once more. Their numbers have no common divisor, so that 140 lines
# differ.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v")


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure that draws itself in memory: no window is opened, and no figure of the caller's is touched.

    Args:
        width: in inches, at 130 dots an inch.
        height: in inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def line_look(number: int) -> dict[str, Any]:
    """Colour, dashes and marker of the line with this number, as arguments of matplotlib's `plot`."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": DASHES[number % len(DASHES)],
        "marker": MARKERS[number % len(MARKERS)],
    }


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Means of each `window` values in a row, N - window + 1 of N.

    >>> moving_average([1.0, 2.0, 6.0], 2)
    [1.5, 4.0]
    """
    return [statistics.fmean(values[start : start + window]) for start in range(len(values) - window + 1)]


def pixels(figure: "Figure") -> "np.ndarray[Any, Any]":
    """The figure as (H, W, 3) uint8, as loggers take it."""
    import numpy as np

    canvas: Any = figure.canvas
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def svg(figure: "Figure") -> str:
    """The figure as an SVG document; the same figure gives the same text."""
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.hashsalt": "figure", "svg.fonttype": "path"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()
