"""Token rewards as HTML: one renderer for files, notebooks and loggers.

A page is one file that needs nothing else, no script and no network, and forbids both to itself. Whatever text of a
prompt, response or file name is shown, it is text.
"""

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path

from rto_lightning.backbone import Message
from rto_lightning.html_documents import escaped, html_document, visible
from rto_lightning.inspection.colours import COVERED, STEPS, colour_rules, step_class, step_of, symmetric_limit
from rto_lightning.inspection.curve import cumulative_curve
from rto_lightning.inspection.pieces import Span, spans
from rto_lightning.inspection.responses import (
    ComparedResponses,
    Rewarded,
    RewardedResponse,
    as_responses,
    named_responses,
)
from rto_lightning.runs.files import written_whole


@dataclass(frozen=True)
class TokenRewardPage:
    """Responses, pairs and comparisons with the reward of each token as its colour, on one scale.

    In a notebook it shows itself.
    """

    items: Sequence[Rewarded] = field(repr=False)
    """What is shown, in order."""
    title: str = "Token rewards"
    """Heading; empty for none."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What stands under the heading, by name."""
    unit: str = "nats"
    """Unit of the rewards; empty for that of the reward that a policy is trained on."""
    limit: float | None = None
    """Magnitude at which the colours end; None for the smallest that covers 95% of the rewards shown."""

    def html(self) -> str:
        """The page as a file."""
        return html_document(self.title or "Token rewards", "body{margin:0}", self._repr_html_())

    def save(self, path: str | Path) -> None:
        """Write the page; a file that is there is replaced.

        Raises:
            UserError: if there is no room for it.
        """
        with written_whole(Path(path), "w", encoding="utf-8") as file:
            file.write(self.html())

    def _repr_html_(self) -> str:
        covered = f", which {COVERED:.0%} of the rewards shown do not exceed" if self.limit is None else ""
        limit = self.limit or colour_limit(self.items)
        heading = f"<h1>{escaped(self.title)}</h1>\n" if self.title else ""
        facts = _facts(self.facts)
        sections = "".join(_section(item, limit, self.unit) for item in self.items)
        coloured = any(reward for response in as_responses(self.items) for reward in response.rewards)
        legend = _legend(limit, self.unit, covered) if coloured else ""
        return (
            f'<style>{style_sheet()}</style>\n<div class="token-rewards">\n{heading}{facts}{legend}{sections}</div>\n'
        )


def colour_limit(items: Sequence[Rewarded]) -> float:
    """The magnitude at which the colours end: the smallest that covers 95% of the rewards of what is shown."""
    return symmetric_limit(
        sum(response.rewards[span.start : span.end])
        for response in as_responses(items)
        for span in spans(response.texts, response.special)
    )


@cache
def style_sheet() -> str:
    """The style of a page, all of it below the class `token-rewards`."""
    return colour_rules() + "\n" + (files("rto_lightning.inspection") / "page.css").read_text(encoding="utf-8")


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(f"<div><dt>{escaped(name)}:</dt><dd>{escaped(value)}</dd></div>" for name, value in facts.items())
    return f"<dl>{rows}</dl>\n" if rows else ""


def _legend(limit: float, unit: str, covered: str) -> str:
    steps = "".join(f'<span class="{step_class(step)}"></span>' for step in range(-STEPS, STEPS + 1))
    low, high = (html.escape(f"{sign}{limit:g} {unit}".strip()) for sign in "-+")
    return (
        f'<div class="legend"><div class="steps">{steps}</div>'
        f'<div class="ends"><span>{low}</span><span>0</span><span>{high}</span></div>'
        "<p>Reward of a token: blue where the DPO model makes it more likely than its reference does, orange where "
        f'less<span class="printed"> (underlined)</span>. Colours end at {limit:g}{covered}. Point at or tap a token '
        "for its values.</p></div>\n"
    )


def _section(item: Rewarded, limit: float, unit: str) -> str:
    answers = named_responses(item)
    turns = "".join(_turn(message) for message in next(iter(answers.values())).prompt)
    articles = "".join(_article(name, answer, limit, unit) for name, answer in answers.items())
    curve = "" if isinstance(item, ComparedResponses) else cumulative_curve(item)
    return f'<section>{turns}<div class="answers">{articles}</div>{curve}</section>\n'


def _turn(message: Message) -> str:
    role, content = (escaped(message[key]) for key in ("role", "content"))
    return f'<p class="turn" dir="auto"><b>{role}:</b> {content}</p>'


def _article(name: str, response: RewardedResponse, limit: float, unit: str) -> str:
    facts = [f"{len(response.rewards)} tokens"]
    if any(response.rewards):
        facts.insert(0, f"sum {response.total:+.3f} {unit}".strip())
    if response.score is not None:
        facts.append(f"score {response.score:+.3f}")
    sums = response.cumulative
    tokens = "".join(_token(span, response, sums, limit) for span in spans(response.texts, response.special))
    return (
        f'<article><h2>{escaped(name)} <span class="facts">{html.escape(" | ".join(facts))}</span></h2>'
        f'<p class="tokens" dir="auto">{tokens}</p></article>'
    )


def _token(span: Span, response: RewardedResponse, sums: Sequence[float], limit: float) -> str:
    text, start, end = span
    reward = sum(response.rewards[start:end])
    step = step_of(reward, limit)
    classes = {
        "t": True,
        step_class(step): step != 0,
        "negative": step < 0,
        "special": response.special[start],
        "break": text != "" and not text.strip("\r\n"),
    }
    place = f"token {start + 1}" if end == start + 1 else f"tokens {start + 1} to {end}"
    tip = [
        json.dumps(visible(text), ensure_ascii=False),
        f"reward {reward:+.4f}",
        f"sum so far {sums[end - 1]:+.3f}",
        f"{place} of {len(sums)}",
        *(["ends a sentence"] if any(response.sentence_ends[start:end]) else []),
    ]
    shown = " ".join(name for name, holds in classes.items() if holds)
    # The blank before a word has no colour: at the end of a line it would be a mark that belongs to nothing.
    blank = " " if text[:1] == " " and text != " " else ""
    return (
        f'{blank}<span class="{shown}" tabindex="-1" title="{html.escape(" | ".join(tip))}">'
        f"{escaped(text.removeprefix(blank))}</span>"
    )
