"""The HTML page: what it says, that nothing of a response gets out of its text, and how it looks in a browser."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rto_lightning.inspection import RewardedPair, TokenRewardPage
from rto_lightning.inspection.colours import (
    DARK,
    LIGHT,
    STEPS,
    Theme,
    colour,
    step_of,
    symmetric_limit,
)
from rto_lightning.inspection.page import style_sheet
from tests.inspection.browser import CHROMIUM, contrast, look
from tests.inspection.made import STOP, pair, rewarded

HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)>&amp;\'"'


class Reader(HTMLParser):
    """The elements of a page, with their attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def tokens(self) -> list[dict[str, str | None]]:
        return [found for tag, found in self.elements if tag == "span" and "title" in found]


def channels(hexadecimal: str) -> list[float]:
    return [float(int(hexadecimal[at : at + 2], 16)) for at in (1, 3, 5)]


def test_each_token_has_its_colour_and_values() -> None:
    page = TokenRewardPage([pair(score=2.0)], limit=1.0).html()
    tokens = Reader(page).tokens()
    assert [found["class"] for found in tokens[:5]] == ["t p1", "t n1 negative", "t p8", "t", "t p2 special"]
    assert [found["class"] for found in tokens[5:]] == ["t p1", "t n1 negative", "t n10 negative", "t p3 special"]
    assert tokens[2]["title"] == '" good" | reward +0.8000 | sum so far +0.800 | token 3 of 5'
    assert "ends a sentence" in str(tokens[3]["title"])
    text = "".join(Reader(page).texts)
    assert "Chosen sum +1.000 nats | 5 tokens | score +2.000" in text
    assert "Rejected sum -1.200 nats | 4 tokens | score -2.000" in text
    assert "-1 nats" in text and "+1 nats" in text and "they part after token 2" in text


def test_the_curve_is_the_cumulative_sum() -> None:
    page = TokenRewardPage([rewarded(["a", "b"], [1.0, -3.0])]).html()
    points = re.search(r'<polyline class="chosen" points="([^"]*)"', page)
    assert points is not None
    x, y = zip(*(map(float, point.split(",")) for point in points[1].split()), strict=True)
    assert list(x) == [0.0, 300.0, 600.0]
    assert y[1] < y[0] < y[2] and (y[2] - y[1]) / (y[0] - y[1]) == pytest.approx(3.0, rel=0.02)
    assert "sum so far ends at -2" in page


def test_no_text_gets_out_of_its_place(tmp_path: Path) -> None:
    response = rewarded([HOSTILE, " ok"], [1.0, 0.0], HOSTILE)
    page = TokenRewardPage([response, RewardedPair(response, response)], HOSTILE, {HOSTILE: HOSTILE}, HOSTILE).html()
    read = Reader(page)
    assert {tag for tag, _ in read.elements}.isdisjoint({"script", "img", "link", "iframe"})
    assert not [
        name for _, found in read.elements for name in found if name.startswith("on") or name in ("src", "href")
    ]
    assert sum(HOSTILE in text for text in read.texts) >= 8
    assert "http:" not in page and "https:" not in page and "url(" not in style_sheet() and "@import" not in page
    TokenRewardPage([response]).save(tmp_path / "page.html")
    assert HOSTILE not in (tmp_path / "page.html").read_text(encoding="utf-8")


@settings(deadline=None)
@given(st.text(max_size=40))
def test_any_text_can_be_shown(text: str) -> None:
    page = TokenRewardPage([rewarded([text, STOP], [0.5, 0.0], text)]).html()
    page.encode()
    assert len(Reader(page).tokens()) == 2


def test_the_scale_is_symmetric_and_minds_no_outlier() -> None:
    assert symmetric_limit([]) == symmetric_limit([0.0]) == 1.0
    rewards = [0.01 * n for n in range(1, 101)]
    assert symmetric_limit(rewards) == symmetric_limit([-reward for reward in rewards]) == 0.96
    assert symmetric_limit([*rewards, 1e9]) == 0.96
    assert step_of(5.0, 1.0) == -step_of(-5.0, 1.0) == STEPS and step_of(0.04, 1.0) == 0


def test_what_is_not_finite_has_its_place_on_the_scale() -> None:
    assert symmetric_limit([0.5, math.nan, math.inf]) == 0.5
    assert step_of(math.nan, 0.5) == 0 and step_of(math.inf, 0.5) == -step_of(-math.inf, 0.5) == STEPS


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6).filter(lambda reward: abs(reward) > 1e-6), min_size=1))
def test_the_scale_covers_what_it_says(rewards: list[float]) -> None:
    limit = symmetric_limit(rewards)
    assert sum(abs(reward) <= limit for reward in rewards) >= 0.95 * len(rewards)
    assert limit <= 1.1 * max(map(abs, rewards))


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_text_is_legible_on_every_colour(theme: Theme) -> None:
    shown = [colour(theme, step) for step in range(-STEPS, STEPS + 1)]
    assert min(contrast(channels(theme.ink), channels(found)) for found in shown) >= 4.5
    assert len(set(shown)) == 2 * STEPS + 1 and all(found in style_sheet() for found in shown if found != theme.paper)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (Debian: chromium-headless-shell)")
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_in_a_browser(tmp_path: Path, width: int, dark: bool) -> None:
    from PIL import Image

    words = ["It", " is", " good", "\n\n", " שלום", " 了", "x" * 300, HOSTILE, STOP]
    rewards = [0.1, -0.2, 3.0, 0.5, -0.6, 0.7, -2.0, 1.0, 0.0]
    long = rewarded(words, rewards, "Why? " * 30 + "y" * 200, score=1.0)
    facts = {"a long name of a figure that does not fit": "outputs/" + "z" * 120}
    page = TokenRewardPage([RewardedPair(long, pair().rejected), long], facts=facts).html()
    seen, picture = look(page, tmp_path, width, dark=dark)
    assert seen["width"] == width and seen["scroll_width"] <= width
    assert seen["scripts"] == 0 and HOSTILE in seen["text"] and "Chosen" in seen["text"] and "Rejected" in seen["text"]
    shown = [*words, *pair().rejected.texts, *words]
    assert seen["tokens"] == [text.removeprefix(" ") for text in shown]
    for left, top, right, bottom in seen["boxes"]:
        assert left >= 0 and right <= width and right > left and bottom > top
    assert min(contrast(found["colour"], found["background"]) for found in seen["texts"]) >= 4.5
    chosen, rejected = seen["articles"][:2]
    beside = chosen[2] <= rejected[0] and chosen[1] == rejected[1]
    assert beside if width > 1000 else chosen[3] <= rejected[1]
    assert len(seen["curves"]) == 3 and all(right - left > 40 for left, _, right, _ in seen["curves"])
    with Image.open(picture) as image:
        assert image.width == width
        colours = {tuple(found[:3]) for _, found in image.convert("RGB").getcolors(1 << 24) or ()}
    theme = DARK if dark else LIGHT
    assert {tuple(map(int, channels(colour(theme, step)))) for step in (0, STEPS, -STEPS)} <= colours
