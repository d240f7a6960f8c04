"""Several sources of scores as one."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rto_lightning.rewards.normalization import ScoreNormalizer, score_statistics
from rto_lightning.rewards.source import RewardSource


class WeightedScores(nn.Module):
    """The weighted sum of the sources' scores, each normalised by statistics of its own.

    Args:
        sources: S sources of scores.
        weights: one for each.
        normalize: False leaves scores in the sources' own units.
    """

    def __init__(self, sources: Sequence[RewardSource], weights: Sequence[float], normalize: bool) -> None:
        super().__init__()
        self.sources = list(sources)
        self.weights = list(weights)
        self.normalizers = nn.ModuleList(ScoreNormalizer(normalize) for _ in self.sources)
        # Outside models move to the device with this module; a list alone would hide them.
        self.models = nn.ModuleList(source for source in self.sources if isinstance(source, nn.Module))

    def combine(self, scores: Tensor) -> Tensor:
        """The weighted sum of normalised scores, (B,).

        Args:
            scores: what every source says in its own units, (B, S) float32.

        Raises:
            UserError: if mean and standard deviation of a source were not measured yet.
        """
        columns = [normalizer(column) for normalizer, column in zip(self.normalizers, scores.T, strict=True)]
        return torch.stack([weight * column for weight, column in zip(self.weights, columns, strict=True)]).sum(0)

    def normalizer(self, number: int = 0) -> ScoreNormalizer:
        """The normalizer of one source."""
        normalizer = self.normalizers[number]
        assert isinstance(normalizer, ScoreNormalizer)
        return normalizer

    @property
    def ready(self) -> bool:
        """Whether all scores can be normalised."""
        return all(self.normalizer(number).ready for number in range(len(self.sources)))

    def statistics(self) -> dict[str, list[float]]:
        """Mean and standard deviation by the sources' names; empty where scores are not normalised."""
        normalizers = {source.name: self.normalizer(number) for number, source in enumerate(self.sources)}
        return {name: n.mean_std.tolist() for name, n in normalizers.items() if n.enabled and n.ready}

    def restore(self, statistics: Mapping[str, Sequence[float]]) -> None:
        """Take over what `statistics` returned in another run, for sources of the same name that have none."""
        for number, source in enumerate(self.sources):
            if source.name in statistics and not self.normalizer(number).ready:
                mean, std = statistics[source.name]
                self.normalizer(number).set(mean, std)

    def measure(self, scores: Tensor) -> None:
        """Set the statistics that are not known yet from scores of the reference's answers, (N, S).

        Raises:
            UserError: if a source scores all of them the same.
        """
        for number, source in enumerate(self.sources):
            normalizer = self.normalizer(number)
            if not normalizer.ready:
                normalizer.set(*score_statistics(scores[:, number], source.name).tolist())
