"""How often a score ranks the chosen answer of a pair above the rejected one."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rto_lightning.algorithms.statistics import clustered_mean_interval

LIKE_LENGTH = 0.15
"""Pairs whose answers differ in length by at most this share of the longer one count as of like length."""


@dataclass
class PairRecords:
    """What is known of each pair of a test set, gathered batch by batch."""

    cluster: list[Tensor] = field(default_factory=list)
    """Equal for pairs of the same prompt, (B,) int64 a batch: such pairs are not independent."""
    characters: list[Tensor] = field(default_factory=list)
    """Lengths of the chosen, then of the rejected answers, (2B,) int64 a batch."""
    scores: dict[str, list[Tensor]] = field(default_factory=dict)
    """For each score: its values for the chosen, then for the rejected answers, (2B,) a batch."""

    def add(self, cluster: Tensor, characters: Tensor, scores: dict[str, Tensor]) -> None:
        """Add one batch of pairs."""
        self.cluster.append(cluster.cpu())
        self.characters.append(characters.cpu())
        for name, values in scores.items():
            self.scores.setdefault(name, []).append(values.double().cpu())


def pair_accuracy(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """Whether a score ranks each pair as labelled.

    Args:
        chosen_scores: Shape ``(B,)``.
        rejected_scores: Shape ``(B,)``.

    Returns:
        1 where the chosen answer scores higher, 0.5 at a tie, else 0; shape ``(B,)``.

    Example:
        >>> pair_accuracy(torch.tensor([2.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 1.0]))
        tensor([1.0000, 0.0000, 0.5000])
    """
    return (chosen_scores > rejected_scores).to(chosen_scores.dtype) + 0.5 * (chosen_scores == rejected_scores)


def ranking_accuracies(records: PairRecords) -> dict[str, float]:
    """Share of pairs in which the chosen answer scores higher; a tie counts half.

    Args:
        records: N pairs, at least one.

    Returns:
        For each score `<name>`: `<name>/accuracy`, `/low` and `/high` (95% interval, clustered by prompt), and the same
        under `<name>_like_length` for pairs of like length if there are any; and the numbers of pairs.

    Example:
        >>> records = PairRecords()
        >>> scores = torch.tensor([2.0, 0.0, 1.0, 1.0])  # of two chosen answers, then of the rejected ones
        >>> records.add(torch.tensor([0, 1]), torch.tensor([90, 80, 90, 80]), {"reward": scores})
        >>> ranking_accuracies(records)["reward/accuracy"]
        0.5
    """
    clusters = torch.cat(records.cluster)
    characters = torch.stack([torch.cat([c.chunk(2)[side] for c in records.characters]) for side in (0, 1)]).double()
    like_length = (characters[0] - characters[1]).abs() <= LIKE_LENGTH * characters.amax(0)
    results: dict[str, float] = {"pairs": float(len(clusters)), "pairs_like_length": float(like_length.sum())}
    for name, batches in records.scores.items():
        chosen, rejected = (torch.cat([values.chunk(2)[side] for values in batches]) for side in (0, 1))
        correct = pair_accuracy(chosen, rejected)
        for suffix, selected in (("", torch.ones_like(like_length)), ("_like_length", like_length)):
            if selected.any():
                mean, low, high = clustered_mean_interval(correct[selected], clusters[selected])
                results |= {
                    f"{name}{suffix}/accuracy": float(mean),
                    f"{name}{suffix}/low": float(low),
                    f"{name}{suffix}/high": float(high),
                }
    return results
