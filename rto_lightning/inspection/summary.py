"""A few figures over any number of rewarded responses, of which only sums are kept."""

from collections.abc import Sequence

import torch

from rto_lightning.algorithms import PairRecords, ranking_accuracies
from rto_lightning.inspection.correlation import clustered_correlation
from rto_lightning.inspection.responses import RewardedPair, RewardedResponse, as_responses
from rto_lightning.inspection.tables import add_pairs, prompt_clusters


class RewardSummary:
    """Counts, mean sums, the correlation with the scores, and how often the sums rank pairs as they were labelled."""

    def __init__(self) -> None:
        self.items = 0
        """Responses and pairs so far."""
        self._tokens = 0
        self._cut = 0
        self._totals: list[float] = []
        self._scores: list[float] = []
        self._clusters: list[int] = []
        self._pairs = PairRecords()

    def add(self, items: Sequence[RewardedResponse | RewardedPair]) -> None:
        """Take note of some more."""
        self.items += len(items)
        responses = as_responses(items)
        self._tokens += sum(len(response.rewards) for response in responses)
        self._cut += sum(not response.special[-1] for response in responses)
        self._totals += [response.total for response in responses]
        self._scores += [response.score for response in responses if response.score is not None]
        self._clusters += prompt_clusters(responses)
        pairs = [item for item in items if isinstance(item, RewardedPair)]
        if pairs:
            add_pairs(self._pairs, pairs)

    def facts(self) -> dict[str, str]:
        """The figures as text, by name."""
        count = max(1, len(self._totals))
        facts = {
            "responses": f"{len(self._totals):,}",
            "tokens": f"{self._tokens:,}",
            "mean sum of a response": f"{sum(self._totals) / count:+.3f}",
        }
        if self._cut:
            facts["responses without a stop token, cut off"] = f"{self._cut:,}"
        if self._scores:
            totals, scores = torch.tensor(self._totals, dtype=torch.float64), torch.tensor(self._scores)
            correlation = clustered_correlation(totals, scores, torch.tensor(self._clusters))
            facts["correlation of the sums with the scores"] = str(correlation)
        if self._pairs.cluster:
            figures = ranking_accuracies(self._pairs)
            for name, title in (("token_rewards", "summed token rewards"), ("score", "scores")):
                if f"{name}/accuracy" in figures:
                    share, low, high = (figures[f"{name}/{end}"] for end in ("accuracy", "low", "high"))
                    facts[f"pairs that the {title} rank as labelled"] = f"{share:.1%} ({low:.1%} to {high:.1%})"
        return facts
