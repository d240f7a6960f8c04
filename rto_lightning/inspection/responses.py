"""Responses whose tokens have rewards, as data: what pages, tables and files are made of."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from rto_lightning.backbone import Message


@dataclass(frozen=True)
class RewardedResponse:
    """A response of T tokens, each with the reward that a DPO role gives it."""

    prompt: list[Message] = field(repr=False)
    """The turns before the response."""
    response: str
    """The text, without its stop token."""
    token_ids: list[int] = field(repr=False)
    """T ids, the stop token included if the response has one."""
    texts: list[str] = field(repr=False)
    """What each token adds to the text. A character that several tokens spell stands at the one that completes it, and
    the others are empty; a special token stands by its name."""
    special: list[bool] = field(repr=False)
    """Which tokens are special ones, whose text is a name."""
    rewards: list[float]
    """T rewards, beta_1 * log(dpo / reference); with beta_1 = 1 in nats."""
    sentence_ends: list[bool] = field(repr=False)
    """Which tokens end a sentence; see :func:`rto_lightning.backbone.sentence_ends`."""
    score: float | None = None
    """What a reward model says of the whole response, in its own units; None if none was asked."""

    @property
    def cumulative(self) -> list[float]:
        """The sum of the rewards up to each token, T values."""
        return list(accumulate(self.rewards))

    @property
    def total(self) -> float:
        """The sum of all rewards: with beta_1 = beta of DPO, the implicit reward of the response."""
        return math.fsum(self.rewards)

    def row(self) -> dict[str, Any]:
        """The fields as a row of a file, with `sum` behind `rewards`."""
        return {
            "prompt": self.prompt,
            "response": self.response,
            "token_ids": self.token_ids,
            "tokens": self.texts,
            "special": self.special,
            "rewards": self.rewards,
            "cumulative": self.cumulative,
            "sum": self.total,
            "sentence_ends": self.sentence_ends,
            "score": self.score,
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "RewardedResponse":
        """The response of a row as :meth:`row` makes it; further columns are left alone.

        Raises:
            KeyError: if a column is missing.
        """
        names = ("prompt", "response", "token_ids", "tokens", "special", "rewards", "sentence_ends", "score")
        return cls(*(row[name] for name in names))

    def _repr_html_(self) -> str:
        from rto_lightning.inspection.page import TokenRewardPage

        return TokenRewardPage([self])._repr_html_()


@dataclass(frozen=True)
class RewardedPair:
    """The two responses of a preference, to one prompt."""

    chosen: RewardedResponse
    rejected: RewardedResponse

    @property
    def margin(self) -> float:
        """The sum of the chosen response's rewards minus that of the rejected one's."""
        return self.chosen.total - self.rejected.total

    @property
    def first_divergence(self) -> int:
        """The number of tokens with which both responses begin. Their rewards are the same up to there."""
        pairs = zip(self.chosen.token_ids, self.rejected.token_ids, strict=False)
        same = [chosen == rejected for chosen, rejected in pairs]
        return same.index(False) if False in same else len(same)

    def _repr_html_(self) -> str:
        from rto_lightning.inspection.page import TokenRewardPage

        return TokenRewardPage([self])._repr_html_()


@dataclass(frozen=True)
class ComparedResponses:
    """Responses to one prompt that are shown beside each other: of one policy over time, or of several policies."""

    by_name: Mapping[str, RewardedResponse]
    """At least one response, each under the name that stands over it."""

    def _repr_html_(self) -> str:
        from rto_lightning.inspection.page import TokenRewardPage

        return TokenRewardPage([self])._repr_html_()


Rewarded = RewardedResponse | RewardedPair | ComparedResponses
"""What a page shows under one prompt."""


def named_responses(item: Rewarded) -> dict[str, RewardedResponse]:
    """The responses of an item by the names that stand over them, of a pair the chosen one first."""
    if isinstance(item, RewardedPair):
        return {"Chosen": item.chosen, "Rejected": item.rejected}
    return dict(item.by_name) if isinstance(item, ComparedResponses) else {"Response": item}


def as_responses(items: Sequence[Rewarded]) -> list[RewardedResponse]:
    """Every response of a list, of a pair the chosen one first."""
    return [response for item in items for response in named_responses(item).values()]
