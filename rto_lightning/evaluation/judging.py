"""Who wins: judges, and the simplest of them, which gives each answer a score of its own."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from rto_lightning.backbone import Message
from rto_lightning.evaluation.answers import Comparison

Scorer = Callable[[list[list[Message]], list[str]], list[float]]
"""Gives prompts and answers a score each; one that is not finite counts as none."""


@dataclass(frozen=True)
class Judgment:
    """What a judge says of a comparison."""

    games: tuple[float, ...]
    """What the model's answer won in each: 1, 0, 0.5 for a tie, or how sure the judge is; none if it is unjudged."""
    problem: str = ""
    """Why it is unjudged."""


class Judge(Protocol):
    """Compares answers."""

    name: str
    """In tables and files."""

    def judge(self, comparisons: Sequence[Comparison]) -> list[Judgment]:
        """One judgment for each comparison."""
        ...


class ScoreJudge:
    """The answer with the higher score wins.

    Args:
        name: of what gives scores.
        scorer: gives them. Answers that it has scored, such as the baseline's, it is not asked about again.
    """

    def __init__(self, name: str, scorer: Scorer) -> None:
        self.name = name
        self._scorer = scorer
        self._scores: dict[tuple[str, str], float] = {}

    def judge(self, comparisons: Sequence[Comparison]) -> list[Judgment]:
        """See :meth:`Judge.judge`."""
        wanted = {
            (comparison.id, text): comparison.prompt
            for comparison in comparisons
            for text in (comparison.baseline, comparison.answer)
            if (comparison.id, text) not in self._scores
        }
        if wanted:
            scores = self._scorer(list(wanted.values()), [text for _, text in wanted])
            self._scores.update(zip(wanted, scores, strict=True))
        return [
            self._compare(
                self._scores[comparison.id, comparison.baseline], self._scores[comparison.id, comparison.answer]
            )
            for comparison in comparisons
        ]

    @staticmethod
    def _compare(baseline: float, answer: float) -> Judgment:
        if not (math.isfinite(baseline) and math.isfinite(answer)):
            return Judgment((), "an answer has no finite score")
        return Judgment((float(answer > baseline) + 0.5 * (answer == baseline),))
