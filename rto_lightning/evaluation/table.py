"""Win rates as text."""

import math
from collections.abc import Sequence

from rto_lightning.evaluation.win_rates import ModelResult, WinRate


def results_table(results: Sequence[ModelResult]) -> str:
    """A line for each model and, below, for each part of the benchmark; then what is unjudged."""
    rows = [("", "win rate", "95% interval", "won/tied/lost", "characters")]
    for result in results:
        lengths = f"{result.characters:.0f} : {result.baseline_characters:.0f}"
        rows.append((f"{result.model} : {result.baseline}", *_cells(result.overall), lengths))
        rows += [(f"  {name}", *_cells(rate), "") for name, rate in result.categories.items()]
        if result.length_controlled:
            percent = f"{result.length_controlled['length_controlled_winrate']:.2f}"
            error = f"± {1.96 * result.length_controlled['lc_standard_error']:.2f}"
            rows.append(("  length-controlled", percent, error, "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        row[0].ljust(widths[0])
        + "".join("  " + cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    for result in results:
        if result.problems:
            reasons = list(dict.fromkeys(result.problems.values()))
            more = f" and {len(reasons) - 3} other reasons" if len(reasons) > 3 else ""
            lines.append(
                f"{result.model}: {len(result.problems)} of {len(result.comparisons)} prompts are unjudged "
                f"({'; '.join(reasons[:3])}{more})"
            )
    return "\n".join(line.rstrip() for line in lines)


def _cells(rate: WinRate) -> tuple[str, str, str]:
    percent = "-" if math.isnan(rate.percent) else f"{rate.percent:.2f}"
    interval = "-" if math.isnan(rate.low) else f"{rate.low:.2f} to {rate.high:.2f}"
    return percent, interval, f"{rate.wins}/{rate.ties}/{rate.losses}"
