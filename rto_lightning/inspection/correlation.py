"""How token rewards go together with something else: the score of a reward model, or another DPO model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rto_lightning.algorithms import fractional_ranks
from rto_lightning.errors import UserError
from rto_lightning.inspection.responses import RewardedResponse
from rto_lightning.inspection.tables import prompt_clusters

_RESAMPLES = 1000


@dataclass(frozen=True)
class Correlation:
    """A correlation with its interval of 95%; nan where a side does not vary."""

    value: float
    low: float
    high: float
    count: int
    """Number of points."""

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f}, {self.count} points)"


@dataclass(frozen=True)
class Agreement:
    """How two DPO models judge the same responses."""

    tokens: Correlation
    """Of the rewards of the same tokens."""
    totals: Correlation
    """Of the summed rewards of the same responses."""
    same_sign: float
    """Share of the tokens that both reward or both punish, of those to which both give anything."""


def clustered_correlation(x: Tensor, y: Tensor, clusters: Tensor, ranked: bool = False, seed: int = 0) -> Correlation:
    """Correlation with an interval that allows for dependence within clusters.

    The interval holds the middle 95% of the correlations of resampled clusters (percentile bootstrap; Davison and
    Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8).

    Args:
        x: floating point, (N,).
        y: floating point, (N,).
        clusters: equal numbers for points of one cluster, int64, (N,).
        ranked: Spearman's correlation, of ranks, in the place of Pearson's.
        seed: of the resampling.
    """
    x, y = x.double(), y.double()
    if ranked:
        x, y = fractional_ranks(x), fractional_ranks(y)
    x, y = x - x.mean(), y - y.mean()
    _, group = torch.unique(clusters, return_inverse=True)
    moments = torch.stack([torch.ones_like(x), x, y, x * x, y * y, x * y], dim=1)
    sums = moments.new_zeros(int(group.max()) + 1 if len(group) else 0, 6).index_add(0, group, moments)
    value = float(_correlation(sums.sum(0)))
    if len(sums) < 2:
        return Correlation(value, float("nan"), float("nan"), len(x))
    generator = torch.Generator().manual_seed(seed)
    resampled = torch.stack(
        [sums[torch.randint(len(sums), (len(sums),), generator=generator)].sum(0) for _ in range(_RESAMPLES)]
    )
    low, high = _correlation(resampled).nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Correlation(value, low, high, len(x))


def score_correlation(responses: Sequence[RewardedResponse], ranked: bool = False) -> Correlation:
    """Of the summed token rewards with the reward model's score, over responses.

    Raises:
        UserError: if a response has no score.
    """
    scores = [response.score for response in responses if response.score is not None]
    if len(scores) < len(responses):
        raise UserError("some responses have no score; read them with a reward model (`scores`, or --reward).")
    totals = torch.tensor([response.total for response in responses], dtype=torch.float64)
    clusters = torch.tensor(prompt_clusters(responses), dtype=torch.int64)
    return clustered_correlation(totals, torch.tensor(scores, dtype=torch.float64), clusters, ranked)


def agreement(first: Sequence[RewardedResponse], second: Sequence[RewardedResponse], ranked: bool = False) -> Agreement:
    """Compare what two DPO models say of the same tokens.

    Args:
        first: N responses as the one model rewards them.
        second: the same as the other does.
        ranked: Spearman's correlations in the place of Pearson's.

    Raises:
        UserError: if they are not the same responses in the same tokens.
    """
    if [response.token_ids for response in first] != [response.token_ids for response in second]:
        raise UserError("the two models were asked about other tokens; give both the same responses and tokenizer.")
    clusters = torch.tensor(prompt_clusters(first), dtype=torch.int64)
    lengths = torch.tensor([len(response.rewards) for response in first], dtype=torch.int64)
    ours, theirs = (
        torch.tensor([reward for response in responses for reward in response.rewards], dtype=torch.float64)
        for responses in (first, second)
    )
    our_totals, their_totals = (
        torch.tensor([response.total for response in responses], dtype=torch.float64) for responses in (first, second)
    )
    both = (ours != 0) & (theirs != 0)
    return Agreement(
        clustered_correlation(ours, theirs, clusters.repeat_interleave(lengths), ranked),
        clustered_correlation(our_totals, their_totals, clusters, ranked),
        float((ours.sign() == theirs.sign())[both].double().mean()),
    )


def _correlation(sums: Tensor) -> Tensor:
    """From the sums (..., 6) of 1, x, y, x^2, y^2 and xy; nan where a side does not vary."""
    n, x, y, xx, yy, xy = sums.unbind(-1)
    of_x, of_y = (n * xx - x * x), (n * yy - y * y)
    # What differs by rounding only does not vary.
    varies = (of_x > 1e-12 * n * xx) & (of_y > 1e-12 * n * yy)
    return torch.where(varies, (n * xy - x * y) / (of_x * of_y).sqrt(), torch.nan)
