"""What token rewards say over many responses: by token, by position, at the ends of sentences, behind a divergence.

All intervals are of 95% and cluster-robust: responses to the same prompt are not independent.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rto_lightning.algorithms import PairRecords, clustered_mean_interval, ranking_accuracies
from rto_lightning.inspection.pieces import spans
from rto_lightning.inspection.responses import RewardedPair, RewardedResponse


@dataclass(frozen=True)
class RewardMean:
    """Mean reward of a group of tokens."""

    name: str
    """The token, the position or the place."""
    count: int
    """Number of tokens in the group."""
    mean: float
    low: float
    """Lower end of the interval; nan where all are of one prompt."""
    high: float
    """Upper end of the interval; nan where all are of one prompt."""


def prompt_clusters(responses: Sequence[RewardedResponse]) -> list[int]:
    """A number for each response, the same for responses to the same prompt, in every process."""
    digests = (hashlib.sha256(json.dumps(response.prompt).encode()).digest() for response in responses)
    return [int.from_bytes(digest[:8], signed=True) for digest in digests]


def by_token(responses: Sequence[RewardedResponse], min_count: int = 20) -> list[RewardMean]:
    """Mean reward of each token that occurs at least `min_count` times, the most frequent first.

    Tokens of which none can be shown alone are taken together, with the sum of their rewards.
    """
    observed = (
        (text, sum(response.rewards[start:end]), cluster)
        for response, cluster in zip(responses, prompt_clusters(responses), strict=True)
        for text, start, end in spans(response.texts, response.special)
    )
    rows = [row for row in _means(observed) if row.count >= min_count]
    return sorted(rows, key=lambda row: -row.count)


def extreme_tokens(
    responses: Sequence[RewardedResponse], number: int = 10, min_count: int = 20
) -> tuple[list[RewardMean], list[RewardMean]]:
    """The most rewarded and the most punished tokens, of those whose interval excludes 0.

    They are in the order of the end of the interval that is nearer to 0, since among many tokens the largest mean is
    often that of a rare one.

    Returns:
        At most `number` rewarded ones, and as many punished ones.
    """
    rows = by_token(responses, min_count)
    rewarded = sorted((row for row in rows if row.low > 0), key=lambda row: -row.low)
    punished = sorted((row for row in rows if row.high < 0), key=lambda row: row.high)
    return rewarded[:number], punished[:number]


def by_position(responses: Sequence[RewardedResponse], width: int = 1) -> list[RewardMean]:
    """Mean reward of the tokens at positions 1 to `width`, `width + 1` to `2 * width` and so on."""
    observed = (
        (index // width, reward, cluster)
        for response, cluster in zip(responses, prompt_clusters(responses), strict=True)
        for index, reward in enumerate(response.rewards)
    )
    name = "{first}" if width == 1 else "{first} to {last}"
    rows = sorted(_means(observed), key=lambda row: int(row.name))
    return [
        RewardMean(name.format(first=(first := int(row.name) * width) + 1, last=first + width), *_figures(row))
        for row in rows
    ]


def by_sentence_place(responses: Sequence[RewardedResponse]) -> list[RewardMean]:
    """Mean reward of tokens that begin a sentence, that end one, of those between, and of special tokens."""
    order = ["begins a sentence", "within a sentence", "ends a sentence", "special token"]

    def place(response: RewardedResponse, index: int) -> str:
        if response.special[index]:
            return order[3]
        if response.sentence_ends[index]:
            return order[2]
        return order[0] if index == 0 or response.sentence_ends[index - 1] else order[1]

    observed = (
        (place(response, index), reward, cluster)
        for response, cluster in zip(responses, prompt_clusters(responses), strict=True)
        for index, reward in enumerate(response.rewards)
    )
    return sorted(_means(observed), key=lambda row: order.index(row.name))


def margin_after_divergence(pairs: Sequence[RewardedPair], tokens: int = 10) -> list[RewardMean]:
    """Mean reward of the chosen minus that of the rejected token, at each of the first tokens behind the divergence.

    Position 1 is the first token that differs. A response that has ended has reward 0.
    """
    clusters = prompt_clusters([pair.chosen for pair in pairs])
    observed = (
        (
            offset,
            _at(pair.chosen, pair.first_divergence + offset) - _at(pair.rejected, pair.first_divergence + offset),
            cluster,
        )
        for pair, cluster in zip(pairs, clusters, strict=True)
        for offset in range(tokens)
    )
    rows = sorted(_means(observed), key=lambda row: int(row.name))
    return [RewardMean(str(int(row.name) + 1), *_figures(row)) for row in rows]


def _at(response: RewardedResponse, index: int) -> float:
    """The reward at a position; 0 behind the end."""
    return response.rewards[index] if index < len(response.rewards) else 0.0


def pair_ranking(pairs: Sequence[RewardedPair]) -> dict[str, float]:
    """How often the summed token rewards, and the scores if there are any, put the chosen response first.

    That a DPO model is a reward model for free is seen on pairs that it was not trained on.

    Returns:
        `token_rewards/accuracy`, `/low`, `/high` and so on; see :func:`ranking_accuracies`.
    """
    records = PairRecords()
    add_pairs(records, pairs)
    return ranking_accuracies(records)


def add_pairs(records: PairRecords, pairs: Sequence[RewardedPair]) -> None:
    """Add pairs, all of them with scores or all without, to what :func:`ranking_accuracies` reads."""
    responses = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    scores = {"token_rewards": torch.tensor([response.total for response in responses], dtype=torch.float64)}
    given = [response.score for response in responses if response.score is not None]
    if given and len(given) == len(responses):
        scores["score"] = torch.tensor(given, dtype=torch.float64)
    clusters = torch.tensor(prompt_clusters([pair.chosen for pair in pairs]), dtype=torch.int64)
    records.add(clusters, torch.tensor([len(response.response) for response in responses]), scores)


def means_text(rows: Sequence[RewardMean], heading: str) -> str:
    """Rows as an aligned table of plain text."""
    names = [json.dumps(row.name, ensure_ascii=False) if row.name.strip() != row.name else row.name for row in rows]
    width = max(map(len, [heading, *names]))
    lines = [f"{heading:<{width}}  {'count':>7}  {'mean':>8}  95% interval"]
    lines += [
        f"{name:<{width}}  {row.count:>7}  {row.mean:>+8.3f}  {row.low:+.3f} to {row.high:+.3f}"
        for name, row in zip(names, rows, strict=True)
    ]
    return "\n".join(lines)


def _means(observed: Iterable[tuple[str | int, float, int]]) -> list[RewardMean]:
    """Mean and interval of each group of (group, reward, cluster)."""
    groups: dict[str | int, tuple[list[float], list[int]]] = defaultdict(lambda: ([], []))
    for name, reward, cluster in observed:
        groups[name][0].append(reward)
        groups[name][1].append(cluster)
    return [
        _mean(str(name), torch.tensor(rewards, dtype=torch.float64), torch.tensor(clusters))
        for name, (rewards, clusters) in groups.items()
    ]


def _mean(name: str, rewards: Tensor, clusters: Tensor) -> RewardMean:
    return RewardMean(name, len(rewards), *map(float, clustered_mean_interval(rewards, clusters)))


def _figures(row: RewardMean) -> tuple[int, float, float, float]:
    return row.count, row.mean, row.low, row.high
