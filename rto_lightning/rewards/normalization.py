"""Scores in units of the reference policy: mean 0 and standard deviation 1 over its answers."""

import torch
from torch import Tensor, nn

from rto_lightning.errors import UserError


def score_statistics(scores: Tensor, source: str) -> Tensor:
    """Mean and standard deviation of scores (N,), as (2,).

    Raises:
        UserError: if the scores are all the same, which leaves nothing to normalise by.
    """
    mean_std = torch.stack([scores.mean(), scores.std(correction=0)])
    if not mean_std[1] > 0:
        raise UserError(
            f"{source} gives every answer of the reference policy the score {float(mean_std[0])}; check it."
        )
    return mean_std


class ScoreNormalizer(nn.Module):
    """(score - mean) / std, whose mean and std travel with checkpoints.

    Args:
        enabled: False leaves scores as they are.
    """

    def __init__(self, enabled: bool) -> None:
        super().__init__()
        self.enabled = enabled
        self.register_buffer("mean_std", torch.full((2,), torch.nan))
        self.mean_std: Tensor

    @property
    def ready(self) -> bool:
        """Whether scores can be normalised: mean and std are known, or not asked for."""
        return not self.enabled or bool(self.mean_std.isfinite().all())

    def set(self, mean: float, std: float) -> None:
        """From now on use this mean and standard deviation."""
        self.mean_std.copy_(torch.tensor([mean, std]))

    def forward(self, scores: Tensor) -> Tensor:
        """Normalised scores (B,).

        Raises:
            UserError: if mean and standard deviation were not measured yet.
        """
        if not self.enabled:
            return scores
        if not self.ready:
            raise UserError(
                "mean and standard deviation of the scores are not known yet; call measure_score_statistics first, "
                "or set rewards.normalize_score to false."
            )
        mean, std = self.mean_std.unbind()
        return (scores - mean) / std
