"""Token rewards as a picture: the same spans and colours as the page, and any text in it."""

import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rto_lightning.figures import pixels
from rto_lightning.inspection.colours import LIGHT, STEPS, colour
from rto_lightning.inspection.picture import COLUMNS, _layout, token_reward_picture
from rto_lightning.inspection.responses import ComparedResponses
from tests.inspection.made import STOP, pair, rewarded


def test_the_colours_of_the_page_are_in_it() -> None:
    picture = pixels(token_reward_picture([rewarded(["good", " bad", " so"], [2.0, -2.0, 0.0])], limit=1.0))
    found = {tuple(map(int, channel)) for channel in picture.reshape(-1, 3)}
    for step in (STEPS, -STEPS, 0):
        hexadecimal = colour(LIGHT, step)
        assert tuple(int(hexadecimal[at : at + 2], 16) for at in (1, 3, 5)) in found


def test_lines_are_broken_and_say_whose_they_are() -> None:
    answers = ComparedResponses({"Before": rewarded(["x" * 250, "\n", "y"], [1.0, 0.0, -1.0], score=0.5)})
    cells, lines = _layout([answers, pair()], limit=1.0, max_lines=99)
    texts = ["".join(cell.text for cell in cells if cell.line == line) for line in range(lines)]
    assert texts[:6] == ["user: Why?", "Before | sum +0.000 | score +0.500", "x" * 100, "x" * 100, "x" * 50 + "↵", "y"]
    assert [line for line in texts if line.startswith(("Chosen", "Rejected"))] == [
        "Chosen | sum +1.000",
        "Rejected | sum -1.200",
    ]
    assert all(cell.column + len(cell.text) <= COLUMNS for cell in cells)


def test_what_does_not_fit_is_said_to_be_left_out() -> None:
    cells, lines = _layout([pair()] * 10, limit=1.0, max_lines=12)
    assert lines == 12 and max(cell.line for cell in cells) == 11
    assert cells[-1].text == "[49 more lines]"


@given(st.text(max_size=60))
def test_no_character_is_lost(text: str) -> None:
    cells, _ = _layout([rewarded([text, STOP], [0.5, 0.0])], limit=1.0, max_lines=10_000)
    shown = "".join(cell.text for cell in cells[2:])
    for character in text:
        if character.isprintable() and not character.isspace():
            assert character in shown


@pytest.mark.parametrize("text", ["$x_1$ costs $5", "日本語 🙂 שלום é \u0301", "tab\tand\nnewline"])
def test_any_text_is_drawn_without_a_warning(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixels(token_reward_picture([rewarded([text], [0.5], prompt=text)])).shape[2] == 3


@settings(deadline=None)
@given(st.integers(1, 3))
def test_the_height_is_that_of_the_lines(number: int) -> None:
    one, more = (token_reward_picture([pair()] * n).get_size_inches()[1] for n in (1, 1 + number))
    _, lines = _layout([pair()], 1.0, 99)
    assert more - one == pytest.approx(0.2 * lines * number)
