"""The sum of token rewards along a response, as an inline drawing."""

from collections.abc import Sequence
from typing import NamedTuple

from rto_lightning.inspection.responses import RewardedPair, RewardedResponse

_WIDTH, _HEIGHT = 600.0, 120.0


class _Line(NamedTuple):
    name: str
    kind: str
    """Class of the line in the style sheet."""
    sums: Sequence[float]


def cumulative_curve(item: RewardedResponse | RewardedPair) -> str:
    """A figure in HTML with an SVG inside: the cumulative reward token by token, of a pair both, until either ends."""
    if isinstance(item, RewardedPair):
        lines = [
            _Line("chosen", "chosen", item.chosen.cumulative),
            _Line("rejected", "rejected", item.rejected.cumulative),
        ]
    else:
        lines = [_Line("sum so far", "chosen", item.cumulative)]
    length = max(1, *(len(line.sums) for line in lines))
    values = [0.0, *(value for line in lines for value in line.sums)]
    low, high = min(values), max(values)
    room = (high - low) * 0.06 or 1.0

    def y(value: float) -> float:
        return _HEIGHT * (high + room - value) / (high - low + 2 * room)

    def points(sums: Sequence[float]) -> str:
        return " ".join(f"{_WIDTH * n / length:.1f},{y(value):.1f}" for n, value in enumerate([0.0, *sums]))

    drawn = "".join(f'<polyline class="{line.kind}" points="{points(line.sums)}"/>' for line in lines)
    if isinstance(item, RewardedPair):
        at = _WIDTH * item.first_divergence / length
        drawn = f'<line class="parting" x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{_HEIGHT:g}"/>' + drawn
    ends = "; ".join(f"{line.name} ends at {line.sums[-1]:+.3g}" for line in lines if line.sums)
    return (
        f'<figure><figcaption>{_legend(item)}</figcaption><div class="plot">'
        f'<div class="scale"><span>{high:+.3g}</span><span>{low:+.3g}</span></div>'
        f'<svg role="img" aria-label="Cumulative reward: {ends}" viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" '
        f'preserveAspectRatio="none"><line class="zero" x1="0" x2="{_WIDTH:g}" y1="{y(0):.1f}" y2="{y(0):.1f}"/>'
        f'{drawn}</svg></div><div class="tokens-scale"><span>start</span><span>token {length}</span></div></figure>'
    )


def _legend(item: RewardedResponse | RewardedPair) -> str:
    if isinstance(item, RewardedResponse):
        return "Cumulative reward"
    parting = f"part after token {item.first_divergence}" if item.first_divergence else "part at the first token"
    return (
        'Cumulative reward: <span class="key chosen"></span>chosen, <span class="key rejected"></span>rejected'
        f"; they {parting} (dotted line)"
    )
