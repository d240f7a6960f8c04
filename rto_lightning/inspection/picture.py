"""Token rewards as a picture, for loggers that show no HTML: the spans, steps and colours of the page."""

import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from rto_lightning.figures import new_figure
from rto_lightning.html_documents import visible
from rto_lightning.inspection.colours import LIGHT, colour, step_of
from rto_lightning.inspection.page import colour_limit
from rto_lightning.inspection.pieces import spans
from rto_lightning.inspection.responses import Rewarded, RewardedResponse, named_responses

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

COLUMNS = 100
"""Characters in a line."""
_LINE, _CHARACTER, _SIZE = 0.2, 0.081, 9.5
"""Height of a line and width of a character in inches, and the size in points to which these belong."""
_FONT = "DejaVu Sans Mono"
"""Comes with matplotlib."""


class _Cell(NamedTuple):
    """Characters in one line that have one background."""

    line: int
    column: int
    text: str
    background: str
    bold: bool = False


def token_reward_picture(items: Sequence[Rewarded], max_lines: int = 120, limit: float | None = None) -> "Figure":
    """Draw responses with the reward of each token as its colour.

    Characters that the font lacks stand as boxes.

    Args:
        items: what is shown, in order.
        max_lines: what does not fit into so many lines is left out, and said to be.
        limit: magnitude at which the colours end; None for that of the page.
    """
    limit = limit or colour_limit(items)
    cells, lines = _layout(items, limit, max_lines)
    figure = new_figure(COLUMNS * _CHARACTER + 0.2, (lines + 1) * _LINE)
    figure.set_layout_engine("none")
    width, height = figure.get_size_inches()
    for line, column, text, background, bold in cells:
        left, top = (0.1 + column * _CHARACTER) / width, 1 - (line + 0.5) * _LINE / height
        if background != LIGHT.paper:
            figure.patches.append(
                _rectangle(figure, left, top, len(text) * _CHARACTER / width, _LINE / height, background)
            )
        figure.text(
            left,
            top - 0.72 * _LINE / height,
            _drawable(text),
            family=_FONT,
            size=_SIZE,
            weight="bold" if bold else "normal",
            color=LIGHT.ink,
            parse_math=False,
        )
    return figure


def _layout(items: Sequence[Rewarded], limit: float, max_lines: int) -> tuple[list[_Cell], int]:
    """The cells of all items, and the number of lines they take."""
    cells: list[_Cell] = []
    line = 0
    for item in items:
        answers = named_responses(item)
        turns = [f"{turn['role']}: {turn['content']}" for turn in next(iter(answers.values())).prompt]
        for text in (row for turn in turns for row in textwrap.wrap(visible(turn), COLUMNS)):
            cells.append(_Cell(line, 0, text, LIGHT.paper))
            line += 1
        for name, response in answers.items():
            score = "" if response.score is None else f" | score {response.score:+.3f}"
            title = f"{visible(name)} | sum {response.total:+.3f}{score}"
            cells.append(_Cell(line, 0, title[:COLUMNS], LIGHT.paper, bold=True))
            line += 1
            for cell in _response_cells(response, limit, line):
                cells.append(cell)
                line = cell.line
            line += 1
        line += 1
    if line > max_lines:
        cells = [cell for cell in cells if cell.line < max_lines - 1]
        cells.append(_Cell(max_lines - 1, 0, f"[{line - max_lines + 1} more lines]", LIGHT.paper))
        line = max_lines
    return cells, line


def _response_cells(response: RewardedResponse, limit: float, line: int) -> Iterator[_Cell]:
    """The tokens of a response, broken at the end of a line and at line breaks, which show as ↵."""
    column = 0
    for text, start, end in spans(response.texts, response.special):
        background = colour(LIGHT, step_of(sum(response.rewards[start:end]), limit))
        for part in visible(text).replace("\t", "    ").splitlines(keepends=True) or [""]:
            shown = part.rstrip("\r\n") + ("↵" if part.endswith(("\r", "\n")) else "")
            if column and column + len(shown) > COLUMNS:
                line, column = line + 1, 0
            while shown:
                here, shown = shown[: COLUMNS - column], shown[COLUMNS - column :]
                yield _Cell(line, column, here, background)
                column += len(here)
                if shown:
                    line, column = line + 1, 0
            if part.endswith(("\r", "\n")):
                line, column = line + 1, 0


def _rectangle(figure: "Figure", left: float, top: float, width: float, height: float, background: str) -> "Patch":
    from matplotlib.patches import Rectangle

    return Rectangle((left, top - height), width, height, color=background, linewidth=0, transform=figure.transFigure)


def _drawable(text: str) -> str:
    """The text with what takes no width left out and what the font lacks as boxes."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont(_FONT))
    return "".join(
        character if font.get_char_index(ord(character)) else "□"
        for character in text
        if not unicodedata.combining(character)
    )
