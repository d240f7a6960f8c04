"""The colours of token rewards: blue raises, orange lowers, with the same strength at the same magnitude.

Blue and orange are told apart with every common colour blindness. Text has one colour on all of them: the ends of each
scale are chosen so that its contrast is above 4.5 (WCAG 2.2, AA).
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch

STEPS = 10
"""Colours on either side of no colour."""
COVERED = 0.95
"""Share of the rewards that lie within the scale, so that a few large ones do not leave all others pale."""


class Theme(NamedTuple):
    """A scale: the paper in the middle, and its two ends, each `#rrggbb`."""

    paper: str
    ink: str
    positive: str
    negative: str


LIGHT = Theme(paper="#ffffff", ink="#1a1a1a", positive="#4a9fe0", negative="#f08a24")
DARK = Theme(paper="#15181c", ink="#f4f4f4", positive="#1c6cb4", negative="#a35408")


def symmetric_limit(rewards: Iterable[float]) -> float:
    """The magnitude at which a scale ends: that which the share `COVERED` of the rewards does not exceed.

    Returns:
        Rounded up to two digits; 1 if there is nothing to show. Rewards that are not finite do not count.
    """
    shown = [abs(reward) for reward in rewards if math.isfinite(reward) and reward != 0.0]
    magnitudes = torch.tensor(shown, dtype=torch.float64)
    if len(magnitudes) == 0:
        return 1.0
    limit = float(magnitudes.quantile(COVERED, interpolation="higher"))
    unit = 10.0 ** (math.floor(math.log10(limit)) - 1)
    return float(f"{math.ceil(limit / unit) * unit:.2g}")


def step_of(reward: float, limit: float) -> int:
    """The colour of a reward, from -STEPS to STEPS; beyond the limit it is that of the end. NaN has none, 0."""
    if math.isnan(reward):
        return 0
    return round(STEPS * max(-1.0, min(1.0, reward / limit)))


def colour(theme: Theme, step: int) -> str:
    """The colour of a step in a theme, `#rrggbb`: an even mixture of the paper and the end."""
    end = theme.positive if step > 0 else theme.negative
    share = abs(step) / STEPS
    mixed = (
        round((1 - share) * int(theme.paper[at : at + 2], 16) + share * int(end[at : at + 2], 16)) for at in (1, 3, 5)
    )
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def step_class(step: int) -> str:
    """The name of a step in style sheets: `p3` for 3, `n3` for -3, nothing for 0."""
    return "" if step == 0 else f"{'p' if step > 0 else 'n'}{abs(step)}"


def colour_rules() -> str:
    """The style sheet of all steps, in the dark on dark screens."""
    steps = [step for step in range(-STEPS, STEPS + 1) if step]

    def rules(theme: Theme) -> str:
        base = (
            f".token-rewards{{--paper:{theme.paper};--ink:{theme.ink};--up:{theme.positive};--down:{theme.negative}}}"
        )
        return base + "".join(
            f".token-rewards .{step_class(step)}{{background:{colour(theme, step)}}}" for step in steps
        )

    return f"{rules(LIGHT)}\n@media screen and (prefers-color-scheme:dark){{{rules(DARK)}}}"
